"""Runs are compared only with earlier runs of the same kind, and noise is not a regression."""

from pathlib import Path

import pytest

from wanforge.errors import RequestError
from wanforge.runtime.measure.requests import history
from wanforge.runtime.measure.requests.history import Entry, append, compare, entry, read

MACHINE: dict[str, str | int | float | None] = {
    "cpu": "A",
    "processors": 2,
    "gpu": None,
    "driver": None,
    "torch": "2.13",
}
SUBJECT = {"model": "tiny", "contender": "ort"}


def runs(*values: float, machine: dict[str, str | int | float | None] = MACHINE, name: str = "total") -> Entry:
    return entry(machine, SUBJECT, {name: list(values)})


def verdict(now: Entry, past: list[Entry]) -> str:
    (found,) = compare(now, past)
    return found.verdict


STEADY = [runs(1.0, 1.01, 0.99), runs(1.01, 1.0, 1.02), runs(0.99, 1.0, 0.98), runs(1.0, 1.0, 1.01)]


@pytest.mark.parametrize(
    ("now", "expected"), [(1.0, "pass"), (1.04, "pass"), (0.5, "pass"), (1.07, "regression"), (2.0, "regression")]
)
def test_a_steady_number_may_be_five_percent_slower(now: float, expected: str) -> None:
    assert verdict(runs(now, now, now), STEADY) == expected


def test_noise_between_runs_widens_the_margin() -> None:
    restless = [runs(1.0), runs(1.3), runs(0.8), runs(1.2), runs(0.9)]
    assert verdict(runs(1.5), restless) == "pass"
    assert verdict(runs(2.5), restless) == "regression"


def test_noise_within_runs_widens_it_too() -> None:
    wide = [runs(0.7, 1.0, 1.3) for _ in range(3)]
    assert verdict(runs(1.0, 1.2, 1.4), wide) == "pass"
    assert verdict(runs(2.0, 2.2, 2.4), wide) == "regression"


def test_the_window_rolls() -> None:
    slow, quick = [runs(2.0)] * 20, [runs(1.0)] * history.WINDOW
    assert verdict(runs(1.5), slow + quick) == "regression"
    assert verdict(runs(1.5), quick + slow) == "pass"


def test_microseconds_are_no_regression() -> None:
    assert verdict(runs(5e-6), [runs(1e-6)] * 5) == "pass"


def test_only_like_is_compared_with_like() -> None:
    other_machine = [runs(1.0, machine={**MACHINE, "cpu": "B"})] * 5
    (found,) = compare(runs(9.0), other_machine)
    assert (found.verdict, found.note) == ("not comparable", "cpu differ")
    (found,) = compare(runs(9.0), [])
    assert (found.verdict, found.note) == ("not comparable", "no comparable run in the history")
    (found,) = compare(entry(MACHINE, {**SUBJECT, "contender": "torch"}, {"total": [9.0]}), STEADY)
    assert found.verdict == "not comparable"
    (found,) = compare(runs(9.0, name="decode"), STEADY)
    assert found.note == "0 comparable runs in the history, 3 are needed"
    assert verdict(runs(9.0), STEADY[:2]) == "not comparable"
    assert verdict(runs(9.0), other_machine + STEADY) == "regression"


def test_a_new_version_is_told_beside_the_verdict() -> None:
    (found,) = compare(runs(2.0, machine={**MACHINE, "torch": "2.14"}), STEADY)
    assert (found.verdict, found.note) == ("regression", "torch 2.13 -> 2.14")


def test_a_history_is_appended_to_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history.jsonl"
    append(path, STEADY[:1])
    append(path, STEADY[1:])
    assert read(path) == STEADY
    with pytest.raises(RequestError, match="no history to read"):
        read(tmp_path / "absent.jsonl")
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(RequestError, match=r"line 5: not a benchmark's result"):
        read(path)
