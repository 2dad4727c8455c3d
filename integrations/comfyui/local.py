"""Servers of bundles on this machine, each a process of its own: no CUDA, PyTorch or licence is shared with ComfyUI."""

import asyncio
import atexit
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO

from .errors import NodeError

COMMAND = "WANFORGE_COMMAND"
"""The environment variable with the command, such as ``/opt/wanforge/bin/wanforge``. No workflow can name it."""
ABSENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables by which ComfyUI's packages would get into the other process."""
GUARDIAN = Path(__file__).with_name("guardian.py")
TOLD = 2000
"""Characters of a server's log that an error shows."""


class LocalServer:
    """A server of a bundle.

    Attributes:
        folder: The bundle's.
        url: Where it is, as soon as it can be reached.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.url, self.said = folder, "", ""
        run = [sys.executable, "-I", str(GUARDIAN), *command(), "serve", folder]
        self.log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        options = ["--host", "127.0.0.1", "--port", "0", "--data"]
        environment = {name: value for name, value in os.environ.items() if name not in ABSENT}
        self.process = subprocess.Popen(
            [*run, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for ComfyUI, which then ends this
        )

    def started(self) -> str:
        """The server's address, once it says that.

        Raises:
            NodeError: It ended before.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if " at " not in line:
            self.process.wait()
            try:
                self.check()
            finally:
                self.close()
        self.url = line.rpartition(" at ")[2].strip()
        return self.url

    def check(self) -> None:
        """Raise a NodeError if the server has ended."""
        if self.process.poll() is None:
            return
        if not self.log.closed:
            self.log.seek(0)
            self.said = self.log.read()[-TOLD:].strip() or f"it said nothing; exit code {self.process.returncode}"
        raise NodeError(f"wanforge serve {self.folder} has ended: {self.said}")

    def end(self) -> None:
        """End it, and return at once."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close(self) -> None:
        """Close what a server that has ended leaves open."""
        for each in (self.process.stdin, self.process.stdout, self.log):
            assert each is not None
            each.close()


running: dict[str, LocalServer] = {}
"""The servers of this ComfyUI, by folder."""
lock = threading.Lock()


async def serving(folder: str) -> LocalServer:
    """The server of a bundle, which is started if it is not running.

    Raises:
        NodeError: It cannot be.
    """
    return await asyncio.to_thread(_serving, folder)


def _serving(folder: str) -> LocalServer:
    if not folder.strip():
        raise NodeError("folder: give the folder of a bundle, as wanforge import --out has made it")
    path = os.path.realpath(os.path.expanduser(folder.strip()))
    if not (Path(path) / "manifest.json").is_file():
        raise NodeError(f"folder: {path} is no bundle; wanforge import --out makes one")
    with lock:
        found = running.get(path)
        if found is not None and found.process.poll() is not None:
            found.close()
            found = None
        if found is None:
            found = running[path] = LocalServer(path)
        if not found.url:
            found.started()
    return found


def command() -> list[str]:
    """The command of the installed wanforge.

    Raises:
        NodeError: There is none.
    """
    said = shlex.split(os.environ.get(COMMAND, "")) or ["wanforge"]
    if shutil.which(said[0]) is None:
        raise NodeError(
            f"there is no command {said[0]!r} here. Install it apart from ComfyUI, as in python -m venv wanforge && "
            f"wanforge/bin/pip install 'wanforge[serve]', set {COMMAND} to wanforge/bin/wanforge, and start ComfyUI "
            "again"
        )
    return said


def state(folder: str) -> str:
    """Changes if another bundle is in a folder."""
    try:
        return str((Path(folder.strip()).expanduser() / "manifest.json").stat().st_mtime_ns)
    except (OSError, RuntimeError):
        return "none"


@atexit.register
def end_all() -> None:
    """End the servers with ComfyUI."""
    for each in running.values():
        each.end()
