"""Let things go wrong while a server makes clips, and look for what was lost.

    python -m tests.usage.serving.faults --trials 20 --seed 1 --markdown table.md

A trial submits jobs to `wanforge serve` with two workers, which make clips of TinyWan. While the first ones are made
and others are submitted, something goes wrong at a random moment (`kinds`). In the end every accepted job must have
been completed, with files that are to the byte those of a run without faults, or have failed with the fault's code.
No attempt runs twice, no job more often than it may, and no process and no temporary file is left.

All processes are real and talk through real sockets. A child runs out of memory by a limit of its address space; it
hangs because it is stopped by a signal; a full disk is a tmpfs of 1.1 GB; the clock is moved within the processes,
whose `time.time` follows a file. The command exits with 1 if anything was wrong, and keeps the folders of those
servers.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from time import monotonic

from tests.usage.serving.clips import POISONED, USUAL, Digests, undisturbed
from tests.usage.serving.kinds import DISK_BYTES, KINDS
from tests.usage.serving.server import Server, kill
from tests.usage.serving.trial import Kind, Trial, trial
from wanforge.api import export, import_checkpoint

COLUMNS = (
    *("fault", "trials", "jobs accepted", "completed", "failed as intended", "lost", "half files", "other faults"),
    *("objects left", "longest recovery"),
)
HEAD = f"| {' | '.join(COLUMNS)} |"
RULE = f"|---|{'--:|' * (len(COLUMNS) - 1)}"


class Trials:
    """All trials of a run, in a folder that has the bundle.

    Args:
        server: What most kinds share.
        known: The clips as they are without faults.
    """

    def __init__(self, folder: Path, server: Server, known: Digests, seed: int) -> None:
        self.folder, self.server, self.known, self.seed = folder, server, known, seed

    def run(self, kind: Kind, count: int) -> list[Trial]:
        """Run the trials of a kind."""
        size = kind.trials_per_server
        if not size:
            return self._with(self.server, kind, range(count))
        parts = [range(first, min(count, first + size)) for first in range(0, count, size)]
        return [each for numbers in parts for each in self._apart(kind, numbers)]

    def _with(self, server: Server, kind: Kind, numbers: range) -> list[Trial]:
        return [
            trial(kind, server, self.known, number, Random(f"{self.seed} {kind.name} {number}")) for number in numbers
        ]

    def _apart(self, kind: Kind, numbers: range) -> list[Trial]:
        """Run trials with a server of their own."""
        place = self.folder / f"{kind.name} {numbers[0]}"
        with disk(place / "data", is_small=kind.is_small):
            server = Server(place, self.folder / "bundle")
            try:
                server.start()
                done = self._with(server, kind, numbers)
                done[-1].faults += ended(server)
            finally:
                kill(server.processes())
        return done


def ended(server: Server) -> list[str]:
    """End a server, and look for processes that are left."""
    code = server.stop()
    left = [f"{each} is left" for each in server.processes()]
    said = ["the log has a traceback"] if "Traceback" in server.log else []
    return left + said + ([f"the server ended with {code}"] if code else [])


@contextmanager
def disk(place: Path, *, is_small: bool) -> Iterator[None]:
    """A folder, on a small disk of its own if that is wanted."""
    place.mkdir(parents=True)
    if not is_small:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether a small disk can be made."""
    try:
        with disk(folder / "small", is_small=True):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def line(kind: Kind, done: list[Trial]) -> str:
    """A kind's line of the table."""
    counts = [
        len(done),
        *(sum(getattr(each, name) for each in done) for name in ("accepted", "completed", "failed")),
        *(sum(len(getattr(each, name)) for each in done) for name in ("lost", "half", "faults")),
        sum(each.left for each in done),
    ]
    longest = max(each.recovery_s for each in done)
    return " | ".join([f"| {kind.name}", *map(str, counts), f"{longest:.1f} s |"])


def faults(folder: Path, count: int, seed: int, only: str = "") -> tuple[list[str], bool]:
    """Run trials of every kind. Returns the table, and whether all is well."""
    start = monotonic()
    wanted = [kind for kind in KINDS if not only or kind.name in only.split(",")]
    print(f"seed {seed}, {count} trials of {len(wanted)} kinds, in {folder}", flush=True)
    import_checkpoint(folder / "bundle", recipe="w8a8")
    export(folder / "bundle", ["fp32"])
    server, lines, is_well = Server(folder / "shared", folder / "bundle"), [HEAD, RULE], True
    try:
        server.start()
        clips = {*USUAL, *(clip for kind in wanted for clip in kind.first if clip != POISONED)}
        every = Trials(folder, server, undisturbed(server, clips), seed)
        for kind in wanted:
            if kind.is_small and not can_mount(folder):
                print(f"{kind.name}: left out, because this user cannot mount a tmpfs", flush=True)
                continue
            done = every.run(kind, count)
            complaints = [f"{kind.name}, trial {each.number}: {found}" for each in done for found in each.complaints]
            is_well = is_well and not complaints
            lines.append(line(kind, done))
            print("\n".join([*complaints, f"{lines[-1]} {monotonic() - start:.0f} s"]), flush=True)
        if last := ended(server):
            print(f"in the end: {last}")
        return lines, is_well and not last
    finally:
        kill(server.processes())


def main() -> None:
    parser = argparse.ArgumentParser(description="Let things go wrong while a server makes clips.")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="names of kinds, with commas between them")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    options = parser.parse_args()
    folder = Path(mkdtemp(prefix="wanforge-faults-"))
    lines, is_well = faults(folder, options.trials, options.seed, options.only)
    if is_well:
        shutil.rmtree(folder)
    if options.markdown is not None:
        options.markdown.write_text("\n".join(lines) + "\n")
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
