"""Starts every two commands at once on one bundle, and checks that neither loses or damages what the other does.

Run as ``python -m tests.usage.pairs --seed 1``. A pair passes if both commands succeed or one is refused for a reason
that it states, and if afterwards, once the refused one has run again, the bundle is whole and has the results of both.
"""

import argparse
import shutil
import sys
import tempfile
from itertools import combinations_with_replacement
from pathlib import Path
from random import Random
from time import monotonic, sleep

from tests.usage.commands import Ended, Running, run
from tests.usage.folders import BUNDLE, Snapshot, leftovers
from tests.usage.hints import mend
from tests.usage.scenarios import CLIP, EXPORT, IMPORT, Words, must_succeed

COMMANDS: dict[str, Words] = {
    "import --replace": (*IMPORT, "--replace"),
    "import --resume": ("import", "--resume", BUNDLE),
    "export": EXPORT,
    "build rtx4090": ("build", BUNDLE, "--target", "rtx4090", "--frames", "5", "--graph", "head", "--graph", "stem"),
    "build rtx3090": ("build", BUNDLE, "--target", "rtx3090", "--frames", "5", "--graph", "head", "--graph", "stem"),
    "generate": ("generate", BUNDLE, *CLIP, "--out", "clip.mp4"),
    "parity": ("parity", BUNDLE, "--frames", "5", "--steps", "1", "--depth", "step"),
    "inspect": ("inspect", BUNDLE, "--verify"),
}
"""Commands on one bundle, by name."""
REFUSALS = ("was imported again in the meantime", "is missing; ", "is stale, ")
"""Reasons for which a command may be refused beside another one."""
MADE = {
    "build rtx4090": [f"engines/sm_89/128x112x5/{graph}.bf16.engine" for graph in ("head", "stem")],
    "build rtx3090": [f"engines/sm_86/128x112x5/{graph}.bf16.engine" for graph in ("head", "stem")],
}
"""The files in the bundle that a command has made."""


def pair(start: Path, folder: Path, names: tuple[str, str], offset: float) -> list[str]:
    """Run two commands at once on a copy of a bundle, and return what should not have happened."""
    shutil.copytree(start, folder)
    first = Running(COMMANDS[names[0]], folder)
    sleep(offset)
    second = Running(COMMANDS[names[1]], folder)
    both = [first.end(), second.end()]
    faults = [fault for ended in both for fault in ended.faults]
    mended = list(mend(folder))
    for ended in both:
        if ended.code:
            faults += [] if is_refused(ended) else [f"`{ended}` exited with {ended.code}:\n{ended.output[-2000:]}"]
            again = run(ended.words, folder)
            faults += [f"`{again}` exited with {again.code}, alone:\n{again.output[-2000:]}"] if again.code else []
    last = run(("inspect", BUNDLE, "--verify"), folder)
    faults += [f"`{each}` printed a traceback" for each in mended if each.faults]
    faults += [f"the bundle is not whole:\n{last.output[-2000:]}"] if last.code else []
    found = Snapshot.of(folder)
    made = [name for command in names for name in MADE.get(command, [])]
    faults += [f"{name} is lost" for name in made if name not in found.records]
    if "generate" in names and "clip.mp4" not in found.others:
        faults.append("clip.mp4 is lost")
    return [*faults, *found.unlike_its_manifest(), *leftovers(found.files)]


def is_refused(ended: Ended) -> bool:
    return ended.code == 1 and any(reason in ended.output for reason in REFUSALS)


def main() -> int:
    """Run every pair and print what came of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="Seed of the offsets.  [default: from the clock]")
    options = parser.parse_args()
    seed = int(monotonic() * 1000) % 1_000_000 if options.seed is None else options.seed
    folder, random = Path(tempfile.mkdtemp(prefix="wanforge-pairs-")), Random(seed)
    bad = run_pairs(folder, list(combinations_with_replacement(COMMANDS, 2)), random)
    print(f"seed {seed}: {bad} pairs with faults", flush=True)
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


def run_pairs(folder: Path, pairs: list[tuple[str, str]], random: Random) -> int:
    """Run some pairs and return how many had faults; the folders of those are kept."""
    start, bad = folder / "start", 0
    start.mkdir()
    must_succeed(run(IMPORT, start))
    must_succeed(run(EXPORT, start))
    for number, names in enumerate(pairs):
        place, offset = folder / f"pair {number}", random.uniform(0, 1)
        faults = pair(start, place, names, offset)
        print(f"{names[0]} & {names[1]} {offset:.2f} s later: {'FAULT' if faults else 'passed'}", flush=True)
        print("".join(f"  {fault}\n" for fault in faults), end="", flush=True)
        if faults:
            bad += 1
        else:
            shutil.rmtree(place)
    return bad


if __name__ == "__main__":
    sys.exit(main())
