"""A server of two workers in a folder of its own: real processes behind a real socket."""

import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx2
import psutil

from tests.processes import free_port
from tests.usage.commands import clean_environment
from tests.usage.serving import clock, maker
from wanforge.runtime.service.client.connection import Connection
from wanforge.runtime.service.workers.status import ServiceStatus, read_status

MARK = "WANFORGE_TRIAL"
"""The variable by which all processes of a server are found, also those that have lost their parent."""
LIMIT_S = 120.0
"""The longest that anything may take before it counts as lost."""
WORKERS = 2


class Server:
    """A server that can be ended in any way and started again at the same address.

    Args:
        folder: Its log, its notes and its temporary files; `data` is in it unless it is given.
        front: The module that runs in place of the command line.
        options: More options of `wanforge serve`.
    """

    def __init__(
        self,
        folder: Path,
        bundle: Path,
        data: Path | None = None,
        front: str = "tests.usage.serving.front",
        options: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.bundle, self.data = folder, bundle, data or folder / "data"
        self.front, self.options = front, options
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.mark, self.port = secrets.token_hex(8), free_port()
        self.connection = Connection(f"http://127.0.0.1:{self.port}")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until every worker can take jobs."""
        words = ["serve", str(self.bundle), "--port", str(self.port), "--data", str(self.data)]
        with (self.folder / "log").open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.front, *words, "--workers", str(WORKERS), *self.options],
                **{"env": self.environment(), "stdin": subprocess.DEVNULL, "stdout": said, "stderr": said},
            )
        self.wait_until(self.is_ready, "the server is not ready")

    def environment(self) -> dict[str, str]:
        """The environment of all its processes."""
        more = {
            MARK: self.mark,
            "TMPDIR": str(self.temporary),
            clock.FILE: str(self.folder / "clock"),
            maker.FILE: str(self.folder / "runs"),
        }
        return clean_environment() | more

    def stop(self) -> int:
        """End it in good order. Returns its exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(LIMIT_S)
        self.connection.close()
        return code

    @property
    def status(self) -> ServiceStatus | None:
        """What its supervisor tells of the workers."""
        return read_status(self.data)

    @property
    def log(self) -> str:
        """What its processes have logged."""
        file = self.folder / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    def is_ready(self) -> bool:
        """Whether it answers, and every worker can take jobs."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"the server has ended with {self.process.returncode}: {self.log[-3000:]}")
        with suppress(httpx2.TransportError):
            if self.connection.http.get("/readyz").status_code == 200:
                status = self.status
                return status is not None and all(each.state in ("idle", "working") for each in status.workers)
        return False

    def processes(self) -> list[psutil.Process]:
        """All its processes, whoever their parent is."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = LIMIT_S) -> None:
        """Wait until something is so.

        Raises:
            TimeoutError: It has taken too long.
        """
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"{what} after {seconds:g} s: {self.log[-2000:]}")
            time.sleep(0.02)


def kill(processes: list[psutil.Process]) -> None:
    """End processes with SIGKILL, and wait until they have ended."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def children_of(server: Server) -> list[psutil.Process]:
    """The processes that make clips."""
    status = server.status
    pids = [] if status is None else [each.child for each in status.workers if each.child is not None]
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
