"""Signals end a process within a second, in good order, and whatever it is doing."""

import signal
from pathlib import Path

import pytest

from tests.processes import STUCK, signalled, start, wait_for_line
from wanforge.interrupts import Interrupted, ended_by_signals

SIGNALS = {
    signal.SIGINT: (130, "interrupted\n"),
    signal.SIGTERM: (143, "terminated\n"),
    signal.SIGHUP: (129, "ended because the terminal closed\n"),
}

# Both a temporary file and a child process are there when the call begins that does not end.
BUSY = f"""
import subprocess, sys
from pathlib import Path
from wanforge.interrupts import Interrupted, end, ended_by_signals
from wanforge.whole_file import temporary_file, temporary_folder
try:
    with ended_by_signals(), temporary_file(Path(sys.argv[1]) / "clip.mp4"), temporary_folder():
        subprocess.Popen(["sleep", "100"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        exec({STUCK!r})
except Interrupted as interrupt:
    end(interrupt.number)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_long_call_into_a_library_does_not_delay_the_end(tmp_path: Path, number: signal.Signals) -> None:
    process = start(BUSY, tmp_path, TMPDIR=str(tmp_path))
    wait_for_line(process)
    ended = signalled(process, number)
    assert (ended.code, ended.stderr) == SIGNALS[number]
    assert ended.seconds < 1.5
    assert list(tmp_path.iterdir()) == []
    assert len(ended.children) == 1
    assert ended.survivors == []


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    process = start(BUSY, tmp_path, TMPDIR=str(tmp_path))
    wait_for_line(process)
    ended = signalled(process, signal.SIGINT, signal.SIGINT)
    assert (ended.code, ended.stderr) == SIGNALS[signal.SIGINT]
    assert ended.seconds < 0.45
    assert list(tmp_path.iterdir()) == []


def test_python_code_ends_in_good_order(tmp_path: Path) -> None:
    code = """
import sys, time
from wanforge.interrupts import Interrupted, end, ended_by_signals
try:
    with ended_by_signals():
        try:
            print("ready", flush=True)
            time.sleep(100)
        finally:
            open(sys.argv[1], "w").write("cleaned up")
except Interrupted as interrupt:
    end(interrupt.number)
"""
    process = start(code, tmp_path / "said")
    wait_for_line(process)
    ended = signalled(process, signal.SIGTERM)
    assert (ended.code, ended.stderr) == SIGNALS[signal.SIGTERM]
    assert (tmp_path / "said").read_text() == "cleaned up"


@pytest.mark.slow
def test_an_interrupt_that_python_swallows_shows_no_traceback() -> None:
    code = """
import os, signal
from wanforge.interrupts import ended_by_signals
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000): pass
with ended_by_signals():
    Swallows()
    import time
    time.sleep(100)
"""
    process = start(code)
    assert process.wait(timeout=60) == 143
    assert process.communicate()[1] == "terminated\n"


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    code = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from wanforge.interrupts import ended_by_signals
with ended_by_signals():
    os.kill(os.getpid(), signal.SIGHUP)
    print("alive")
"""
    process = start(code)
    assert process.communicate() == ("alive\n", "")


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Interrupted), ended_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
