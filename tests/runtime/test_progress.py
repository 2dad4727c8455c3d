"""Progress is a bar on a terminal, and a line of the log now and then elsewhere."""

import io
import logging
import sys

import pytest

from wanforge import logs
from wanforge.progress import Overall
from wanforge.runtime import progress
from wanforge.runtime.progress import Bars


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True

    def shown(self) -> list[str]:
        """What stood on the line, one time after the other."""
        return [text.strip() for text in self.getvalue().split("\r") if text.strip()]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Let stderr be a terminal. This is no fixture, because pytest replaces stderr again once fixtures are set up."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    return found


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_bar_shows_the_whole_work(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with Bars(Overall({"text": 1, "steps": 3})) as bars:
        bars("text", 1, 1)
        bars._bar.refresh()  # type: ignore[union-attr]
        assert screen.shown()[-1].startswith("25%|")
        assert "text 1 of 1, 0:00 passed, about 0:00 left" in screen.shown()[-1]
    assert screen.getvalue().endswith("\r")


def test_a_log_record_does_not_run_into_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with logs.Console(), Bars(Overall({"text": 1})) as bars:
        bars("text", 1, 2)
        logging.getLogger("wanforge.test").warning("look out")
        assert "\rWARNING: look out\n" in screen.getvalue()


def test_lines_of_json_are_not_mixed_with_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    console = logs.Console()
    console.show(as_json=True)
    with console, Bars(Overall({"text": 1})) as bars:
        bars("text", 1, 2)
    assert screen.getvalue() == ""


def test_without_a_terminal_there_is_a_line_now_and_then(time: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wanforge.progress")
    with Bars(Overall({"steps": 1}, clock=time.monotonic)) as bars:
        for second in range(1, 3601):
            time.now += 1
            bars("steps", second, 3600)
    told = [record.getMessage() for record in caplog.records if record.name == "wanforge.progress"]
    assert told[0] == "  0% done, steps 10 of 3600, 0:10 passed"
    assert told[3] == "  1% done, steps 40 of 3600, 0:40 passed, about 59:20 left"
    assert told[-1].startswith(" 9")
    assert 40 < len(told) < 80


def test_short_work_is_silent(time: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wanforge.progress")
    with Bars() as bars:
        for tenth in range(1, 100):
            time.now += 0.1
            bars("compile", tenth, 99)
    assert not [record for record in caplog.records if record.name == "wanforge.progress"]


def test_stages_are_logged_with_their_seconds(time: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wanforge.stages")
    with Bars() as bars:
        for stage, seconds in (("text", 2), ("text", 1), ("decode", 4)):
            time.now += seconds
            bars(stage, 1, 2)
    assert caplog.messages == ["text took 3.00 s", "decode took 4.00 s"]
