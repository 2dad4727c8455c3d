"""Start two commands at once on one bundle, and compare what they leave with what they do one after the other.

    python -m tests.usage.pairs --seed 1

Every two commands of `COMMANDS` run in a folder that others have prepared, one of them a little later than the other. A
command may fail only with a message of `REFUSALS`; then it is run once more, after the commands that its message hints
at. In the end the folder has to be as if one of the two had run after the other, in either order, and
``wanforge inspect --verify`` has to find nothing. The processes are forked from a warm server (see `commands`).

It exits with 1 if a pair failed, and keeps the folder of that pair.
"""

import argparse
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations_with_replacement, permutations
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from time import monotonic, sleep

from tests.usage.commands import Ended, Running, run
from tests.usage.folders import BUNDLE, Snapshot, differences
from tests.usage.hints import hints, mend
from tests.usage.scenarios import (
    BUILD,
    CLIP,
    EXPORT,
    GENERATE,
    IMPORT,
    STARTS,
    Words,
    must_succeed,
    perform,
)

COMMANDS: dict[str, Words] = {
    "import --replace": (*IMPORT, "--replace"),
    "import --replace, other recipe": ("import", "--recipe", "w8a8-row", "--replace", "--out", BUNDLE),
    "import --resume": ("import", "--resume", BUNDLE),
    "export": EXPORT,
    "build": (*BUILD, "--graph", "time", "--graph", "block"),
    "build, other target": ("build", BUNDLE, "--target", "rtx3090", "--graph", "time", "--graph", "cross_kv"),
    "generate": GENERATE,
    "inspect --verify": ("inspect", BUNDLE, "--verify"),
    "parity": ("parity", BUNDLE, *CLIP, "--depth", "block"),
}
"""What runs side by side, by name."""
ONE_TYPE: dict[str, Words] = {
    "export, float32": (*EXPORT, "--dtype", "fp32"),
    "export, float16": (*EXPORT, "--dtype", "fp16"),
}
"""Exports that run beside each other only, where all graphs are stale."""
STARTING = {"exported": "", "damaged": "import --resume", "old": "export"}
"""The folders that they begin in (see `scenarios.STARTS`): all pairs in the first, and in the others those with the
command that mends them."""
REFUSALS = re.compile(
    r"was imported again in the meantime; run the command again|"
    r"(is missing|damaged.*|stale.*|changed); (write|build) it again with: wanforge|"
    r"has no (bf16 graphs to build engines from|fp32 graphs; make them with: wanforge)|"
    r"PROBLEM "
)
"""What a command may say that the other one has disturbed, or that the folder's own damage has stopped."""
LATEST_S = 1.5
"""The longest time between the two starts."""
TIMES = 3
"""How often a command may be refused and run again."""


@dataclass
class Pair:
    """Two commands that ran at once, and what came of them.

    Attributes:
        refused: How many of them were refused at first.
        log: Every command and its exit code.
        faults: What was wrong.
    """

    names: tuple[str, str]
    start: str
    delay_s: float
    folder: Path
    refused: int = 0
    log: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def note(self, ended: Ended) -> Ended:
        self.log.append(f"{ended.code}  {ended}")
        self.faults += ended.faults
        return ended

    def __str__(self) -> str:
        told = f"{self.names[0]} and, {self.delay_s:.2f} s later, {self.names[1]}, {self.start}, in {self.folder}"
        return "\n  ".join([told, *self.log, *self.faults])


def at_once(folder: Path, seed: int, number: int, start: str, names: tuple[str, str]) -> Pair:
    """Run two commands at once, and compare the folder with those in which they ran in turns."""
    random = Random(f"{seed} {number}")
    names = random.choice(list(permutations(names)))
    place = Path(shutil.copytree(folder / start, folder / f"pair {number}", symlinks=True))
    pair = Pair(names, start, random.choice([0.0, random.uniform(0, LATEST_S)]), place)
    first = Running(words_of(names[0]), place)
    sleep(pair.delay_s)
    second = Running(words_of(names[1]), place)
    for ended in [first.end(), second.end()]:
        pair.note(ended)
        settle(pair, ended)
    *_, last = mend(place)
    pair.note(last)
    if last.code:
        pair.faults.append(f"no hint led to a whole bundle: {last.output[-2000:]}")
    found = Snapshot.of(place)
    orders = {order: differences(found, in_turns(folder, start, order)) for order in permutations(names)}
    if all(orders.values()):
        pair.faults += [f"not as after {' and '.join(order)}: {told}" for order, told in orders.items()]
    if not pair.faults:
        shutil.rmtree(place)
    return pair


def settle(pair: Pair, ended: Ended) -> None:
    """If a command was refused, follow its hints and run it again, until it succeeds."""
    pair.refused += bool(ended.code)
    for _ in range(TIMES):
        if not ended.code:
            return
        if not REFUSALS.search(ended.output):
            pair.faults.append(f"`{ended}` exits with {ended.code}: {ended.output[-2000:]}")
            return
        for each in recover(pair.folder, ended):
            pair.note(each)
        ended = pair.note(run(ended.words, pair.folder))
    pair.faults.append(f"`{ended}` is refused again and again: {ended.output[-2000:]}")


def in_turns(folder: Path, start: str, names: tuple[str, ...]) -> Snapshot:
    """What two commands leave if nothing disturbs them; one that is refused runs again once the bundle is mended."""
    place = Path(shutil.copytree(folder / start, folder / f"in turns {folder_name(names)} {start}", symlinks=True))
    for name in names:
        ended = run(words_of(name), place)
        if ended.code:
            must_succeed(recover(place, ended)[-1])
            must_succeed(run(words_of(name), place))
    *_, mended = mend(place)
    must_succeed(mended)
    found = Snapshot.of(place)
    shutil.rmtree(place)
    return found


def recover(folder: Path, refused: Ended) -> list[Ended]:
    """Follow the hint of a command that was refused, and those for the bundle."""
    return [*(run(hint, folder) for hint in hints(refused)[:1]), *mend(folder)]


def words_of(name: str) -> Words:
    """The command of this name."""
    return {**COMMANDS, **ONE_TYPE}[name]


def folder_name(names: tuple[str, ...]) -> str:
    return " ".join(names).replace(",", "")


def table(pairs: list[Pair]) -> str:
    """The outcomes, a line for each pair."""
    lines = [f"{'':64}{'start':>10}{'refused':>9}{'faults':>8}"]
    for pair in pairs:
        lines.append(f"{' + '.join(pair.names):64}{pair.start:>10}{pair.refused:>9}{len(pair.faults):>8}")
    return "\n".join(lines)


def pairs(seed: int, workers: int, only: str = "") -> list[Pair]:
    """Run all pairs in a folder of their own, which is deleted if none of them found a fault."""
    folder, start = Path(mkdtemp(prefix="wanforge-pairs-")), monotonic()
    every = list(combinations_with_replacement(COMMANDS, 2))
    wanted = [(name, names) for name, mender in STARTING.items() for names in every if not mender or mender in names]
    wanted.append(("old graphs", tuple(ONE_TYPE)))
    wanted = [(name, names) for name, names in wanted if only in " + ".join(names)]
    for name in dict.fromkeys(name for name, _ in wanted):
        (folder / name).mkdir()
        for step in STARTS[name]:
            perform(step, folder / name)
    print(f"seed {seed}, {len(wanted)} pairs, {workers} at a time, in {folder}", flush=True)
    done = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for pair in pool.map(partial(at_once, folder, seed), range(len(wanted)), *zip(*wanted, strict=True)):
            done.append(pair)
            if pair.faults:
                print(pair, flush=True)
    print(table(done))
    print(f"seed {seed}, {len(done)} pairs, {sum(p.refused for p in done)} refused, {monotonic() - start:.0f} s")
    if not any(pair.faults for pair in done):
        shutil.rmtree(folder)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description="Start two commands at once on one bundle.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=min(8, cpu_count() or 1))
    parser.add_argument("--only", default="", help="part of the names of the pairs to run")
    options = parser.parse_args()
    sys.exit(any(pair.faults for pair in pairs(options.seed, options.workers, options.only)))


if __name__ == "__main__":
    main()
