"""How long commands took on this machine, by which it is estimated how long the next ones will take."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from wanforge.configs.loading import Record
from wanforge.errors import ResourceError
from wanforge.plugins.launching.cubins import cache_folder
from wanforge.runtime.measure.machine import cpu_name, device_here

MOST_BYTES = 1 << 18
"""Only the end of the file is read, which holds more than a thousand commands."""
NEAREST = 5
"""The number of earlier commands that an estimate is taken from."""


@dataclass(frozen=True)
class Work:
    """An amount of work of some kind.

    Attributes:
        kind: What is done, and everything that decides how fast: ``generate ort w8a8``.
        amount: How much of it, in a unit that the time is proportional to: bytes, graphs, operations.
    """

    kind: str
    amount: float


class Duration(Record, frozen=True):
    """A command that was completed."""

    machine: str
    kind: str
    amount: float
    seconds: float


@dataclass(frozen=True)
class Expectation:
    """How long some work is expected to take.

    Attributes:
        runs: The number of earlier commands that this is taken from.
    """

    seconds: float
    runs: int


def place() -> Path:
    """The file in the cache that remembers durations.

    Raises:
        ResourceError: This user has no home folder.
    """
    return cache_folder().parent / "durations.jsonl"


def this_machine() -> str:
    """The parts of this machine that decide how fast it is."""
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} processors, {device_here()}"


def remember(work: Work, seconds: float) -> None:
    """Note how long some work took. Where that cannot be written, it is not remembered."""
    line = msgspec.json.encode(Duration(this_machine(), work.kind, work.amount, seconds)) + b"\n"
    with suppress(OSError, ResourceError):
        place().parent.mkdir(parents=True, exist_ok=True)
        with place().open("ab") as file:
            file.write(line)


def expect(work: Work) -> Expectation | None:
    """How long some work should take by the commands of its kind that are nearest in amount; None if there are none."""
    machine = this_machine()
    known = [each for each in _durations() if (each.machine, each.kind) == (machine, work.kind) and each.amount > 0]
    if not known or work.amount <= 0:
        return None
    nearest = sorted(known, key=lambda each: abs(each.amount - work.amount))[:NEAREST]
    rates = sorted(each.seconds / each.amount for each in nearest)
    return Expectation(rates[len(rates) // 2] * work.amount, len(rates))


def _durations() -> list[Duration]:
    """What is remembered, the latest first, so that of equal amounts the latest count."""
    found = []
    with suppress(OSError, ResourceError), place().open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - MOST_BYTES))
        for line in file.read(MOST_BYTES).splitlines():
            with suppress(msgspec.DecodeError, msgspec.ValidationError):  # the first line may be cut
                found.append(msgspec.json.decode(line, type=Duration))
    return found[::-1]
