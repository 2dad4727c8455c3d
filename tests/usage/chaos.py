"""Kills commands at random moments, mends what they left as the tool says, and compares the result.

Run as ``python -m tests.usage.chaos --trials 200 --seed 1``. The same seed picks the same commands and, as far as the
machine's speed allows, the same moments. A trial passes if

- no command prints a traceback or hangs;
- a bundle that `inspect --verify` accepts is what its manifest says, with the weights from before or from after;
- the files beside the bundle are those from before or from after;
- the hinted commands, and the killed one once more, lead to the same files as if nothing had been killed.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import monotonic

from tests.usage.commands import KILLED, Ended, run
from tests.usage.folders import BUNDLE, Snapshot, differences, leftovers, unsound
from tests.usage.hints import hints, mend
from tests.usage.moments import Moment, any_moment
from tests.usage.scenarios import Scenario, begin, prepare, scenarios

AGAIN = 0.25
"""The share of trials in which the command that mends is killed, too."""
REFUSALS = ("is already a bundle",)
"""What a command may say when it runs once more although all is done."""


@dataclass(frozen=True)
class Trial:
    """A command that was killed, and what came of it.

    Attributes:
        killed: Whether it was killed before it ended.
        faults: What should not have happened.
        folder: Where it happened.
    """

    scenario: str
    moment: Moment
    killed: bool
    mended: int
    faults: list[str]
    folder: Path


def trial(folder: Path, scenario: Scenario, random: Random, name: str) -> Trial:
    """Kill a command once, mend its bundle, and compare."""
    place = begin(folder, scenario, name)
    moment = any_moment(random, scenario.seconds, scenario.steps)
    ended = run(scenario.words, place, moment=moment)
    was_killed = ended.code == KILLED
    faults = [*ended.faults, *unacceptable(place, scenario)]
    mending = list(mend_disturbed(place, scenario, random)) if was_killed else list(mend(place))
    again = run(scenario.words, place)
    commands = [*mending, again, *mend(place)]
    faults += [fault for each in commands for fault in each.faults]
    if again.code and not any(refusal in again.output for refusal in REFUSALS):
        faults.append(f"`{again}` exited with {again.code} when nothing disturbed it:\n{again.output[-2000:]}")
    last = run(("inspect", BUNDLE, "--verify"), place)
    if last.code:
        faults.append(f"no hint led to a whole bundle:\n{last.output[-2000:]}")
    faults += differences(Snapshot.of(place), scenario.after)
    return Trial(scenario.name, moment, was_killed, len(mending), faults, place)


def unacceptable(place: Path, scenario: Scenario) -> list[str]:
    """What is wrong with what a killed command has left, beyond what can be mended."""
    found, known = Snapshot.of(place), (scenario.before, scenario.after)
    inspected = run(("inspect", BUNDLE, "--verify"), place)
    faults = list(inspected.faults)
    if not inspected.code:
        faults += [f"accepted although {reason}" for reason in unsound(found, known)]
    elif not hints(inspected) and (place / BUNDLE / "import.json").exists():
        faults.append(f"no hint how to mend it:\n{inspected.output[-2000:]}")
    for name, digest in found.others.items():
        if not leftovers([name]) and digest not in [each.others.get(name) for each in known]:
            faults.append(f"{name} is neither as before nor complete")
    lost = scenario.before.others.keys() - found.others.keys()
    return [*faults, *(f"{name} is lost" for name in sorted(lost))]


def mend_disturbed(place: Path, scenario: Scenario, random: Random) -> Iterator[Ended]:
    """Mend a bundle, and in some trials kill the first command that mends it, and look at what that has left."""
    inspected = run(("inspect", BUNDLE, "--verify"), place)
    if inspected.code and hints(inspected) and random.random() < AGAIN:
        words = hints(inspected)[0]
        yield run(words, place, moment=Moment(seconds=random.uniform(0, scenario.seconds)))
    yield from mend(place)


def main() -> int:
    """Run the trials and print what came of them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="Number of commands to kill.  [default: 200]")
    parser.add_argument("--seed", type=int, help="Seed of the commands and moments.  [default: from the clock]")
    parser.add_argument("--only", default="", help="Only scenarios whose name begins with this.")
    options = parser.parse_args()
    seed = int(monotonic() * 1000) % 1_000_000 if options.seed is None else options.seed
    print(f"seed {seed}, {options.trials} trials", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="wanforge-chaos-"))
    wanted = [scenario for scenario in scenarios() if scenario.name.startswith(options.only)]
    done = run_trials(folder, wanted, options.trials, Random(seed))
    bad = [each for each in done if each.faults]
    print(table(done))
    print(f"seed {seed}: {len(done)} trials, {sum(each.killed for each in done)} killed, {len(bad)} with faults")
    if bad:
        print(f"the folders of the trials with faults are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def run_trials(folder: Path, wanted: list[Scenario], trials: int, random: Random) -> list[Trial]:
    """Run trials of some scenarios in turn; the folders of those without faults are deleted."""
    prepare(folder, wanted)
    done = []
    for number in range(trials):
        each = trial(folder, wanted[number % len(wanted)], Random(random.random()), f"trial {number}")
        done.append(each)
        if each.faults:
            print(f"FAULT in trial {number}, {each.scenario}, killed at {each.moment}:", flush=True)
            print("\n".join(f"  {fault}" for fault in each.faults), flush=True)
        else:
            shutil.rmtree(each.folder)
    return done


def table(done: list[Trial]) -> str:
    """How often each command was killed and mended, and how many trials had faults."""
    names = dict.fromkeys(each.scenario for each in done)
    rows = [f"{'scenario':<32}{'trials':>8}{'killed':>8}{'mended':>8}{'faults':>8}"]
    for name in names:
        those = [each for each in done if each.scenario == name]
        counts = Counter(killed=sum(e.killed for e in those), mended=sum(e.mended > 0 for e in those))
        faults = sum(bool(e.faults) for e in those)
        rows.append(f"{name:<32}{len(those):>8}{counts['killed']:>8}{counts['mended']:>8}{faults:>8}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
