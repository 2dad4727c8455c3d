"""An estimate says what would be done, and what is not known."""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from wanforge.runtime.measure import durations, estimates
from wanforge.runtime.measure.durations import Expectation, Work, remember
from wanforge.runtime.measure.estimates import Estimate, duration, size


@pytest.fixture
def estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Estimate:
    monkeypatch.setattr(durations, "place", lambda: tmp_path / "durations.jsonl")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 0, 5 * 10**9))
    monkeypatch.setattr(estimates, "available_bytes", lambda: 3e9)
    return Estimate(["would write a", "would write b"], [Work("export", 4)], 2.5e6, tmp_path / "deep" / "out", 1.5e9)


def test_it_says_what_is_not_known(estimate: Estimate) -> None:
    assert str(estimate).splitlines() == [
        "would write a",
        "would write b",
        "time    not known: nothing of this kind (export) has been completed on this machine yet",
        "disk    at most 2.50 MB; 5.00 GB are free",
        "memory  about 1.50 GB; 3.00 GB are free",
        "Nothing was written.",
    ]
    assert estimate.as_json()["seconds"] is None


def test_it_names_the_part_whose_time_is_not_known(estimate: Estimate) -> None:
    remember(Work("export", 8), 3.0)
    several = replace(estimate, works=[Work("export", 4), Work("build", 1)])
    assert "nothing of this kind (build) has been completed" in str(several)


def test_it_says_what_the_time_is_taken_from(estimate: Estimate) -> None:
    remember(Work("export", 8), 3.0)
    assert "time    about 1.5 s, by one earlier command on this machine" in str(estimate)
    remember(Work("export", 8), 3.0)
    assert "time    about 1.5 s, by 2 earlier commands on this machine" in str(estimate)
    assert (estimate.as_json()["seconds"], estimate.as_json()["runs"]) == (1.5, 2)


def test_the_time_of_all_parts_must_be_known(estimate: Estimate) -> None:
    both = replace(estimate, works=[Work("denoise", 4), Work("decode", 2)])
    remember(Work("denoise", 8), 3.0)
    assert both.expected is None
    remember(Work("decode", 1), 10.0)
    remember(Work("decode", 1), 10.0)
    assert both.expected == Expectation(21.5, 1)


def test_where_nothing_is_to_be_done_it_takes_no_time(estimate: Estimate) -> None:
    assert "time    none, because nothing is to be done" in str(replace(estimate, works=[]))


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.44, "0.4 s"), (75, "75 s"), (119, "119 s"), (720, "12 min"), (12600, "3.5 h")]
)
def test_times_are_easy_to_read(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(("count", "expected"), [(12.34e6, "12.34 MB"), (1.5e9, "1.50 GB"), (0, "0.00 MB")])
def test_sizes_are_easy_to_read(count: float, expected: str) -> None:
    assert size(count) == expected
