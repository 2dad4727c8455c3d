"""How the front keeps a supervisor running."""

import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import wait_until
from wanforge.runtime.service import supervising
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.supervising import SETTINGS, SupervisorProcess

STAND_IN = """
import signal, sys, time
from pathlib import Path
said = Path(sys.argv[1]).with_name("said")
said.write_text("starting")
while not said.with_name("go").exists():
    time.sleep(0.01)
signal.signal(signal.SIGHUP, lambda number, frame: said.write_text("reloaded"))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
time.sleep(60)
"""
"""A supervisor that takes long until it takes signals."""


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SupervisorProcess]:
    (tmp_path / "stand_in_supervisor.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(supervising, "MODULE", "stand_in_supervisor")
    monkeypatch.setattr(supervising, "FIRST_PAUSE", 0.01)
    found = SupervisorProcess(tmp_path)
    yield found
    found.stop()
    found.wait()


def said(tmp_path: Path) -> str:
    path = tmp_path / "said"
    return path.read_text() if path.exists() else ""


def test_only_its_user_reads_the_settings(tmp_path: Path) -> None:
    SupervisorProcess(tmp_path).write_settings(ServeSettings(store="postgresql://ann:secret@host/jobs"))
    assert stat.S_IMODE((tmp_path / SETTINGS).stat().st_mode) == 0o600


def test_a_hangup_during_the_start_is_kept(supervisor: SupervisorProcess, tmp_path: Path) -> None:
    supervisor.start()
    wait_until(lambda: said(tmp_path) == "starting")
    supervisor.reload()
    (tmp_path / "go").touch()
    wait_until(lambda: said(tmp_path) == "reloaded", 5)


def test_a_supervisor_that_cannot_be_started_is_tried_again(
    supervisor: SupervisorProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, failed = supervising.started, []

    def fail_once(settings: Path) -> "subprocess.Popen[bytes]":
        if failed:
            return start(settings)
        failed.append(settings)
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(supervising, "started", fail_once)
    supervisor.start()
    wait_until(lambda: said(tmp_path) == "starting", 5)
    assert "cannot be started (Resource temporarily unavailable)" in caplog.text
