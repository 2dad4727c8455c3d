"""Kill commands at random moments, mend what they left as the tool hints, and compare with what nothing disturbed.

    python -m tests.usage.chaos --trials 200 --seed 1

A trial prepares a folder, starts a command, and kills it with SIGKILL at a moment of `moments`: after a random time, at
its k-th use of a file, or at a random line of the code that writes. Then ``wanforge inspect --verify`` or
``wanforge generate`` looks at the bundle, and the command that the message hints at is run, which in some trials is
killed as well. When no hint is left, the first command is run again. In the end the folder must equal one in which the
command was not disturbed, byte for byte. At no time may a bundle be accepted that is not as its manifest says.

The processes are forked from a warm server (see `commands`); in one trial of ten, the command that is killed is a new
interpreter. It exits with 1 if a trial failed, and keeps the folder of that trial.
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from time import monotonic

from tests.usage.commands import KILLED, Ended, run
from tests.usage.folders import BUNDLE, Snapshot, differences, unsound
from tests.usage.hints import LOOK, hints, mend
from tests.usage.moments import Moment, any_moment
from tests.usage.scenarios import CLIP, Scenario, begin, prepare, scenarios

IMPORTS_S = 2.0
"""How long a new interpreter takes for its imports, about; it is killed during these as well."""
REFUSED = "is already a bundle"
"""What an import says when it is run again without --replace after it was completed by a hint."""
PROBE = "probe.mp4"


@dataclass
class Trial:
    """One command that was killed, and what came of it.

    Attributes:
        ending: How the command that was to be killed ended.
        log: Every command and its exit code.
        faults: What was wrong.
    """

    number: int
    scenario: str
    moment: str
    ending: str = ""
    log: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    folder: str = ""

    def note(self, ended: Ended) -> Ended:
        self.log.append(f"{ended.code}  {ended}")
        self.faults += ended.faults
        return ended

    def __str__(self) -> str:
        told = [f"trial {self.number}, {self.scenario}, killed at {self.moment} ({self.ending}), in {self.folder}"]
        return "\n  ".join([*told, *self.log, *self.faults])


def trial(folder: Path, wanted: list[Scenario], seed: int, number: int) -> Trial:
    """Kill a command at a moment, mend what it left, and say what was wrong."""
    random = Random(f"{seed} {number}")
    scenario = wanted[number % len(wanted)]
    cold = random.random() < 0.1
    steps = Counter[str]() if cold else scenario.steps
    moment = any_moment(random, scenario.seconds + (IMPORTS_S if cold else 0.0), steps)
    place = begin(folder, scenario, f"trial {number}")
    done = Trial(number, scenario.name, f"{moment}{' of a new interpreter' if cold else ''}", folder=str(place))
    ended = done.note(run(scenario.words, place, cold=cold, moment=moment))
    done.ending = "killed" if ended.code == KILLED else "ended first"
    done.faults += lost(Snapshot.of(place), scenario)
    for _ in mended(done, place, scenario, random):
        pass
    again = done.note(run(scenario.words, place))
    if again.code and REFUSED not in again.output:
        done.faults.append(f"running the command again exits with {again.code}: {again.output}")
    last = list(mend(place))
    if last[-1].code:
        done.faults.append(f"cannot be mended: {last[-1].output}")
    done.faults += differences(Snapshot.of(place), scenario.after)
    if not done.faults:
        shutil.rmtree(place)
    return done


def mended(done: Trial, place: Path, scenario: Scenario, random: Random) -> Iterator[Ended]:
    """Follow the hints of `inspect` or `generate`, sometimes killing the command that mends, and check every answer."""

    def look() -> Ended:
        probe = ("generate", BUNDLE, *CLIP, "--out", PROBE)
        words = probe if scenario.makes_clips and random.random() < 0.25 else LOOK
        ended = done.note(run(words, place))
        found = Snapshot.of(place)
        if not ended.code:
            done.faults.extend(f"`{ended}` accepts it: {why}" for why in unsound(found, scenario.sound))
        elif not hints(ended) and found.manifest is not None:
            done.faults.append(f"`{ended}` exits with {ended.code} and gives no hint: {ended.output[-500:]}")
        (place / PROBE).unlink(missing_ok=True)
        return ended

    def follow(hint: tuple[str, ...]) -> Ended:
        moment = None
        if random.random() < 0.3:
            moment = random.choice(
                [Moment(seconds=random.uniform(0, 1.5)), Moment(step="file", count=random.randint(1, 60))]
            )
        ended = done.note(run(hint, place, moment=moment))
        if ended.code not in (0, KILLED):
            done.faults.append(f"the hint `{ended}` exits with {ended.code}: {ended.output[-500:]}")
        return ended

    return mend(place, look=look, follow=follow)


def lost(found: Snapshot, scenario: Scenario) -> list[str]:
    """Files that were complete before the kill, that the command was to keep, and that are not there any more."""
    before, after = scenario.before, scenario.after
    kept = {name for name, it in before.files.items() if after.files.get(name) == it and not name.endswith(".json")}
    changed = {name for name in before.others if name not in kept}
    return [
        *(f"{name} was lost" for name in sorted(kept) if found.files.get(name) != before.files[name]),
        *(
            f"{name} is neither the old one nor the new one"
            for name in sorted(changed)
            if found.files.get(name) not in (before.files[name], after.files.get(name))
        ),
    ]


def table(trials: list[Trial], wanted: list[Scenario]) -> str:
    """The outcomes, a line for each scenario."""
    lines = [f"{'':36}{'trials':>8}{'killed':>8}{'hints':>8}{'faults':>8}"]
    for name in [*(scenario.name for scenario in wanted), "all"]:
        mine = [each for each in trials if name in (each.scenario, "all")]
        killed = sum(each.ending == "killed" for each in mine)
        followed = sum(1 for each in mine for line in each.log[1:-1] if "inspect" not in line and PROBE not in line)
        lines.append(f"{name:36}{len(mine):>8}{killed:>8}{followed:>8}{sum(bool(each.faults) for each in mine):>8}")
    return "\n".join(lines)


def chaos(count: int, seed: int, workers: int, only: str = "") -> list[Trial]:
    """Run trials in a folder of their own, which is deleted if none of them found a fault."""
    folder, start = Path(mkdtemp(prefix="wanforge-chaos-")), monotonic()
    wanted = [scenario for scenario in scenarios() if only in scenario.name]
    prepare(folder, wanted)
    print(f"seed {seed}, {count} trials of {len(wanted)} scenarios, {workers} at a time, in {folder}", flush=True)
    done = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for each in pool.map(partial(trial, folder, wanted, seed), range(count)):
            done.append(each)
            if each.faults:
                print(each, flush=True)
    print(table(done, wanted))
    print(f"seed {seed}, {len(done)} trials, {monotonic() - start:.0f} s")
    if not any(each.faults for each in done):
        shutil.rmtree(folder)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill commands at random moments, and mend what they leave.")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=min(8, cpu_count() or 1))
    parser.add_argument("--only", default="", help="part of the names of the scenarios to run")
    options = parser.parse_args()
    trials = chaos(options.trials, options.seed, options.workers, options.only)
    sys.exit(any(each.faults for each in trials))


if __name__ == "__main__":
    main()
