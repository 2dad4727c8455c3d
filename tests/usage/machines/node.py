"""A machine of a service on several machines: a process of `wanforge serve` with a role, and a folder of its own."""

import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.processes import free_port, wait_until
from tests.usage.commands import clean_environment
from wanforge.runtime.service.client.connection import Connection


class Node:
    """A machine that can be ended in any way and started again at the same address.

    Args:
        words: What is typed behind ``wanforge``, besides the folder and the port.
        variables: Its environment, besides that of all commands.
    """

    def __init__(self, folder: Path, name: str, words: list[str], variables: Mapping[str, str]) -> None:
        self.folder, self.name, self.words, self.variables = folder, name, words, dict(variables)
        self.port, self.data = free_port(), folder / name
        self.url = f"http://127.0.0.1:{self.port}"
        self.connection = Connection(self.url)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, without waiting for anything."""
        more = ["--data", str(self.data), "--port", str(self.port)]
        with self.log.open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.usage.machines.front", *self.words, *more],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=clean_environment() | self.variables,
            )

    @property
    def log(self) -> Path:
        """What its processes have said."""
        return self.folder / f"{self.name}.log"

    def readiness(self) -> dict[str, Any]:
        """What it answers monitors; nothing as long as it does not answer."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        with suppress(httpx2.TransportError):
            found: dict[str, Any] = self.connection.http.get("/readyz").json()
            return found
        return {}

    def wait_ready(self) -> None:
        """Wait until it can do its part."""
        wait_until(lambda: self.readiness().get("ready"), 90)

    def kill(self) -> None:
        """End it as a power cut would, with all its processes."""
        assert self.process is not None
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for each in below:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(below, timeout=30)

    def end(self) -> int:
        """End it in good order. Returns its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def close(self) -> None:
        """Leave no process."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.connection.close()
