"""Keeps results from run to run, one JSON object per line, and compares a run with earlier comparable ones.

A number is compared with the median of the last runs of the same thing on the same machine. It is a regression where
it is slower by more than a margin: 5 %, 50 microseconds, or three times the noise between those runs or within them,
whichever is largest.
"""

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from wanforge.errors import RequestError, naming
from wanforge.runtime.measure.machine import COMPARABLE, PACKAGES, Facts

WINDOW, FEWEST = 10, 3
"""The most earlier runs that count, and the fewest from which their noise can be estimated."""
LEAST_MARGIN, LEAST_SECONDS = 0.05, 50e-6
NOISES = 3.0
"""Standard deviations by which a number may be off by chance."""
DEVIATION = 1.4826
"""Standard deviation of a normal distribution divided by its median absolute deviation."""

Verdict = Literal["pass", "regression", "not comparable"]


class Entry(msgspec.Struct, frozen=True):
    """One benchmark run of one subject.

    Attributes:
        subject: What was measured: model, recipe, clip, contender. Only entries with equal subjects are compared.
        values: Seconds of every run, by name; smaller is better.
    """

    time: str
    machine: Facts
    subject: dict[str, Any]
    values: dict[str, list[float]]


@dataclass(frozen=True)
class Trend:
    """One number compared with earlier ones.

    Attributes:
        now, before: Medians in seconds; `before` is None where there is nothing to compare with.
        margin: Share of `before` by which `now` may exceed it.
        note: Why it is not comparable, or what has changed that may explain the difference.
    """

    name: str
    verdict: Verdict
    now: float
    before: float | None = None
    margin: float | None = None
    count: int = 0
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def entry(machine: Facts, subject: Mapping[str, Any], values: Mapping[str, Sequence[float]]) -> Entry:
    """The entry of a run that has just ended."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(now, dict(machine), dict(subject), {name: list(runs) for name, runs in values.items()})


def digest(record: object) -> str:
    """A short hash of a configuration, by which equal ones are recognised."""
    return hashlib.sha256(msgspec.json.encode(record)).hexdigest()[:12]


def append(path: Path, entries: Sequence[Entry]) -> None:
    """Append entries to a history, which need not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("ab") as file:
        file.write(b"".join(msgspec.json.encode(each) + b"\n" for each in entries))


def read(path: Path) -> list[Entry]:
    """Every entry of a history, the oldest first.

    Raises:
        RequestError: There is no such file, or a line of it is not an entry.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RequestError(f"{path}: no history to read ({error.strerror}); write one with --history") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(msgspec.json.decode(line, type=Entry))
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise RequestError(f"{path}, line {number}: not a benchmark's result ({error})") from None
    return found


def compare(now: Entry, past: Sequence[Entry]) -> list[Trend]:
    """Compare every number of a run with those of earlier comparable runs."""
    same_subject = [each for each in past if each.subject == now.subject]
    alike = [each for each in same_subject if not differing(each, now)]
    if not alike:
        other = differing(same_subject[-1], now) if same_subject else []
        reason = f"{', '.join(other)} differ" if other else "no comparable run in the history"
        return [
            Trend(name, "not comparable", statistics.median(runs), note=reason) for name, runs in now.values.items()
        ]
    return [compare_value(name, now, alike[-WINDOW:]) for name in now.values]


def differing(one: Entry, other: Entry) -> list[str]:
    """The facts of the machine that rule out a comparison."""
    return [name for name in COMPARABLE if one.machine.get(name) != other.machine.get(name)]


def compare_value(name: str, now: Entry, alike: Sequence[Entry]) -> Trend:
    """Compare one number with those of comparable runs."""
    runs = now.values[name]
    current = statistics.median(runs)
    before = [each.values[name] for each in alike if each.values.get(name)]
    if len(before) < FEWEST:
        note = f"{len(before)} comparable runs in the history, {FEWEST} are needed"
        return Trend(name, "not comparable", current, note=note)
    medians = [statistics.median(each) for each in before]
    usual = statistics.median(medians)
    within = [noise(each) / len(each) ** 0.5 for each in [*before, runs]]
    margin = max(LEAST_SECONDS, LEAST_MARGIN * usual, NOISES * noise(medians), NOISES * statistics.median(within))
    verdict: Verdict = "regression" if current - usual > margin else "pass"
    share = margin / usual if usual else 0.0
    return Trend(name, verdict, current, usual, share, len(before), changes(alike[-1], now))


def noise(values: Sequence[float]) -> float:
    """Standard deviation, estimated from the median absolute deviation."""
    middle = statistics.median(values)
    return DEVIATION * statistics.median(abs(value - middle) for value in values)


def changes(before: Entry, now: Entry) -> str:
    """Versions, and the CPU's clock, that differ from the last run."""
    names = ("torch", "triton", *PACKAGES, "python", "clock_mhz")
    pairs = ((name, before.machine.get(name), now.machine.get(name)) for name in names)
    return ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)
