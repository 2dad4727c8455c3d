"""Servers of bundles on this machine, each a process of its own: no CUDA, PyTorch or licence is shared with ComfyUI."""

import asyncio
import atexit
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from .errors import NodeError

COMMAND = "WANFORGE_COMMAND"
"""The environment variable with the command, such as ``/opt/wanforge/bin/wanforge``. No workflow can name it."""
ABSENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables by which ComfyUI's packages would get into the other process."""
GUARDIAN = Path(__file__).with_name("guardian.py")
START_SECONDS = 120.0
"""How long a server may take until it can be reached."""
LOOK_SECONDS = 0.1
"""How often it is looked whether it can."""
KEPT = 2000
"""Characters of what a server has said that are kept, for errors."""
BEGUN = re.compile(r"Serving .* at (\S+)\n")


class LocalServer:
    """A server of a bundle.

    Attributes:
        folder: The bundle's.
        url: Where it is, as soon as it can be reached.
        said: The end of what it has said.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.url, self.said = folder, "", ""
        self.latest_start = time.monotonic() + START_SECONDS
        run = [sys.executable, "-I", str(GUARDIAN), *command(), "serve", folder]
        options = ["--host", "127.0.0.1", "--port", "0", "--data"]
        environment = {name: value for name, value in os.environ.items() if name not in ABSENT}
        self.process = subprocess.Popen(
            [*run, *options],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for ComfyUI, which then ends this
        )
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            while data := output.read(4096):
                self.said = (self.said + data.decode(errors="replace"))[-KEPT:]
                if not self.url and (begun := BEGUN.search(self.said)):
                    self.url = begun[1]

    async def started(self) -> None:
        """Wait until it can be reached.

        Raises:
            NodeError: It ended before, or takes too long and is ended.
        """
        while not self.url:
            self.check()
            if time.monotonic() > self.latest_start:
                self.end()
                raise NodeError(
                    f"wanforge serve {self.folder} could not be reached after {START_SECONDS:.0f} s and is ended; run "
                    f"the workflow again, or this command in a terminal. It said: {self.said.strip() or 'nothing'}"
                )
            await asyncio.sleep(LOOK_SECONDS)

    def check(self) -> None:
        """Raise a NodeError if the server has ended."""
        if self.process.poll() is None:
            return
        self.end()
        self.listener.join(1)  # it may not have read the last words yet
        said = self.said.strip() or f"it said nothing; exit code {self.process.returncode}"
        raise NodeError(f"wanforge serve {self.folder} has ended: {said}")

    def end(self) -> None:
        """End it, and return at once."""
        assert self.process.stdin is not None
        self.process.stdin.close()


running: dict[str, LocalServer] = {}
"""The servers of this ComfyUI, by folder."""
lock = threading.Lock()
"""Held while `running` is looked at and changed, and never while a server is waited for."""


async def serving(folder: str) -> LocalServer:
    """The server of a bundle, which is started if it is not running.

    Raises:
        NodeError: It cannot be.
    """
    if not folder.strip():
        raise NodeError("folder: give the folder of a bundle, as wanforge import --out has made it")
    path = os.path.realpath(os.path.expanduser(folder.strip()))
    if not (Path(path) / "manifest.json").is_file():
        raise NodeError(f"folder: {path} is no bundle; wanforge import --out makes one")
    with lock:
        found = running.get(path)
        if found is None or found.process.poll() is not None:
            if found is not None:
                found.end()
            found = running[path] = LocalServer(path)
    await found.started()
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
