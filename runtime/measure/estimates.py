"""What a command would do, and how much time, disk and memory it would take: the report of ``--dry-run``."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from wanforge.errors import WanforgeError
from wanforge.host.capacity import available_bytes, free_disk_bytes
from wanforge.runtime.measure.durations import Expectation, Work, expect


@dataclass(frozen=True)
class Estimate:
    """What a command would do and take.

    Attributes:
        steps: What it would do, a line each.
        works: The parts of the work that its time depends on.
        disk_bytes: The bytes that it would write at most.
        folder: Where it would write them; the folder need not exist yet.
        memory_bytes: The memory that it takes at most.
        failures: What it could not do, and why.
    """

    steps: list[str]
    works: list[Work]
    disk_bytes: float
    folder: Path
    memory_bytes: float
    failures: list[str] = field(default_factory=list)

    @property
    def free_bytes(self) -> int:
        """Free bytes on the disk that it would write to."""
        return free_disk_bytes(self.folder)

    @property
    def expected(self) -> Expectation | None:
        """The time of all parts of the work; None if that of one is not known."""
        parts = [expect(work) for work in self.works]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return Expectation(sum(part.seconds for part in known), min((part.runs for part in known), default=0))

    def as_json(self) -> dict[str, Any]:
        """The estimate in bytes and seconds; the time is null if it is not known."""
        expected = self.expected
        return {
            "steps": self.steps,
            "seconds": expected and expected.seconds,
            "runs": expected.runs if expected else 0,
            "disk_bytes": self.disk_bytes,
            "disk_free_bytes": self.free_bytes,
            "memory_bytes": self.memory_bytes,
            "memory_free_bytes": available_bytes(),
            "failures": self.failures,
        }

    def __str__(self) -> str:
        return "\n".join(
            [
                *self.steps,
                f"time    {self._said_time()}",
                f"disk    at most {size(self.disk_bytes)}; {size(self.free_bytes)} are free",
                f"memory  about {size(self.memory_bytes)}; {size(available_bytes())} are free",
                "Nothing was written.",
            ]
        )

    def _said_time(self) -> str:
        """The expected time, and what it is taken from."""
        expected = self.expected
        if expected is None:
            unknown = next(work.kind for work in self.works if expect(work) is None)
            return f"not known: nothing of this kind ({unknown}) has been completed on this machine yet"
        if not self.works:
            return "none, because nothing is to be done"
        runs = "one earlier command" if expected.runs == 1 else f"{expected.runs} earlier commands"
        return f"about {duration(expected.seconds)}, by {runs} on this machine"


def show(estimate: Estimate, *, as_json: bool) -> None:
    """Print an estimate, unless nothing could be done.

    Raises:
        WanforgeError: The command could not do all that it is asked for.
    """
    if as_json or estimate.steps:
        click.echo(json.dumps(estimate.as_json()) if as_json else str(estimate))
    if estimate.failures:
        raise WanforgeError("\n".join(estimate.failures))


def duration(seconds: float) -> str:
    """A time in words: ``0.4 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """A number of bytes in words: ``12.3 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
