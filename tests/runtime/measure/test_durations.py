"""Estimates of time come from earlier commands of the same kind on the same machine, or there are none."""

from pathlib import Path

import pytest

from wanforge.runtime.measure import durations
from wanforge.runtime.measure.durations import Expectation, Work, expect, remember

PLACE = durations.place


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(durations, "place", lambda: tmp_path / "durations.jsonl")
    return tmp_path


def test_nothing_is_expected_before_anything_was_done() -> None:
    assert expect(Work("generate", 10)) is None


def test_time_is_proportional_to_the_amount() -> None:
    remember(Work("generate", 10), 5.0)
    assert expect(Work("generate", 30)) == Expectation(15.0, 1)


@pytest.mark.parametrize("other", [Work("export", 10), Work("generate ort", 10)])
def test_work_of_another_kind_says_nothing(other: Work) -> None:
    remember(other, 5.0)
    assert expect(Work("generate", 10)) is None


def test_other_machines_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(Work("generate", 10), 5.0)
    monkeypatch.setattr(durations, "this_machine", lambda: "another")
    assert expect(Work("generate", 10)) is None


def test_the_nearest_amounts_count_and_of_equal_ones_the_latest() -> None:
    for amount, seconds in [(10, 100.0), *[(1000, 1000.0)] * 20, *[(10, 5.0)] * 5, *[(10, 20.0)] * 3]:
        remember(Work("generate", amount), seconds)
    assert expect(Work("generate", 11)) == Expectation(22.0, 5)
    assert expect(Work("generate", 900)) == Expectation(900.0, 5)


def test_damaged_lines_are_passed_over() -> None:
    remember(Work("generate", 10), 5.0)
    with durations.place().open("ab") as file:
        file.write(b'{"kind": 3}\n\xff\xfe\n{"machine"')
    assert expect(Work("generate", 10)) == Expectation(5.0, 1)


def test_a_long_past_is_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations, "MOST_BYTES", 1000)
    for seconds in [*[50.0] * 100, *[5.0] * 5]:
        remember(Work("generate", 10), seconds)
    assert expect(Work("generate", 10)) == Expectation(5.0, 5)


def test_where_nothing_can_be_written_nothing_is_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").touch()
    monkeypatch.setattr(durations, "place", lambda: cache / "file" / "durations.jsonl")
    remember(Work("generate", 10), 5.0)
    assert expect(Work("generate", 10)) is None


def test_without_a_home_folder_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(durations, "place", PLACE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    remember(Work("generate", 10), 5.0)
    assert expect(Work("generate", 10)) is None
