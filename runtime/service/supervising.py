"""The supervisor as the front of the service sees it: a process that is started, watched and started again."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.workers.settings import Supervision
from wanforge.whole_file import temporary_file

log = logging.getLogger(__name__)

MODULE = "wanforge.runtime.service.workers.supervisor"
SETTINGS = "supervision.json"
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds until a supervisor that has died is started again. They double with each death."""
CALM_SECONDS = 60.0
"""The time after which a supervisor that dies counts as the first one."""


class SupervisorProcess:
    """Keeps a supervisor running until `stop`.

    Args:
        data: The folder of the service, where its settings are; see `write_settings`.
    """

    def __init__(self, data: Path) -> None:
        self.path = data / SETTINGS
        self._ends = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def write_settings(self, settings: ServeSettings) -> None:
        """Write what the supervisor reads when it starts, and when it is told to reload. Nobody else may read it, since
        the URL of a job store may have a password.

        Raises:
            OSError: It cannot be written.
        """
        with temporary_file(self.path) as temporary:
            temporary.chmod(0o600)
            temporary.write_bytes(msgspec.json.encode(Supervision(serve=settings)))
            os.replace(temporary, self.path)

    @property
    def is_ending(self) -> bool:
        """Whether it has been told to end."""
        return self._ends.is_set()

    def start(self) -> None:
        """Start it, and from then on whenever it has died."""
        self._thread.start()

    def reload(self) -> None:
        """Let it read the settings again and reload the bundles."""
        self._signal(signal.SIGHUP)

    def stop(self) -> None:
        """Let it end: running jobs may finish within their grace."""
        if not self._ends.is_set():
            self._ends.set()
            self._signal(signal.SIGTERM)

    def hurry(self) -> None:
        """Give running jobs back at once."""
        self._signal(signal.SIGTERM)

    def wait(self) -> None:
        """Wait until it has ended."""
        self._thread.join()

    def _signal(self, number: int) -> None:
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # in what this thread starts, until that can take it
        pause = FIRST_PAUSE
        while not self._ends.is_set():
            begun = time.monotonic()
            end = self._run()
            if self._ends.is_set():
                return
            if time.monotonic() - begun > CALM_SECONDS:
                pause = FIRST_PAUSE
            log.error("The supervisor %s; it is started again in %g s.", end, pause)
            self._ends.wait(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)

    def _run(self) -> str:
        """Start the supervisor and wait for its end, however that comes. Returns what is to be said of it."""
        try:
            # This thread starts it, and it ends with this thread, even if that is killed.
            self._process = started(self.path)
        except OSError as error:
            return f"cannot be started ({error.strerror})"
        if self._ends.is_set():
            self._signal(signal.SIGTERM)  # which came too early for it
        return f"ended with {self._process.wait()}"


class NoSupervisor(SupervisorProcess):
    """Stands where a machine has no workers, and so nothing that has to be kept running."""

    def write_settings(self, settings: ServeSettings) -> None:
        """Write nothing, since nobody would read it."""

    def _watch(self) -> None:
        self._ends.wait()


def started(settings: Path) -> "subprocess.Popen[bytes]":
    """Start a supervisor. It has a session of its own, so that Ctrl-C reaches only this process, which tells it."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", MODULE, str(settings), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
    )
