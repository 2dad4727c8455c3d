"""Parts run one after the other, whatever becomes of each, and a later call goes on where an earlier one ended."""

import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tools.gpu_day.parts import Part
from tools.gpu_day.results import CUT, FAILED, LATE, PASSED, Results
from tools.gpu_day.run import RESERVED, Call, run_parts

pytestmark = pytest.mark.slow

ROOM = "tests.tools.gpu_day.stand_in_parts"
GOOD, BAD = (Part(name, name, f"{ROOM}:{name}", 60, 1, {"model": "tinywan"}) for name in ("finds", "fails"))
HANGS = Part("hangs", "hangs", f"{ROOM}:hangs", 20, 1, {"model": "tinywan"})


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setattr("tools.gpu_day.run.REHEARSED_SECONDS", 120)
    return Call(Results(tmp_path / "results.jsonl"), tmp_path, tmp_path, True, time.monotonic() + 300)


def test_a_part_that_fails_does_not_end_the_run(call: Call) -> None:
    run_parts(call, [BAD, GOOD])
    assert (call.results.state("fails"), call.results.state("finds")) == (FAILED, PASSED)
    (end,) = call.results.of("fails", "end")
    assert "the part is broken" in end["tail"]
    assert call.results.of("fails", "found")


def test_a_piece_that_fails_does_not_end_its_part(call: Call) -> None:
    part = Part("pieces", "pieces", f"{ROOM}:fails_in_one_piece", 60, 1, {"model": "tinywan"})
    run_parts(call, [part])
    assert call.results.state("pieces") == FAILED
    assert [line["name"] for line in call.results.of("pieces", "failure")] == ["first"]
    assert [line["name"] for line in call.results.of("pieces", "piece")] == ["second"]


def test_a_part_over_its_limit_ends_with_all_its_children(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.gpu_day.run.REHEARSED_SECONDS", 20)
    run_parts(call, [HANGS])
    assert call.results.state("hangs") == LATE
    (line,) = call.results.of("hangs", "children")
    assert not any(_runs(pid) for pid in (*line["pids"], line["own"]))


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_has_ended_is_not_run_again(call: Call) -> None:
    run_parts(call, [GOOD, BAD])
    run_parts(call, [GOOD, BAD])
    assert len(call.results.of("finds", "found")) == 1
    assert len(call.results.of("fails", "found")) == 1


def test_a_part_that_the_end_of_the_call_cuts_short_is_run_by_the_next_one(call: Call) -> None:
    call.results.add("finds", "begin", state=CUT)
    run_parts(call, [GOOD])
    assert call.results.state("finds") == PASSED


def test_nothing_begins_for_which_there_is_no_time(call: Call) -> None:
    run_parts(replace(call, ends=time.monotonic() + RESERVED + 0.5), [GOOD])
    assert call.results.state("finds") is None
