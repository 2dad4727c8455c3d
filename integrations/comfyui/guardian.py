"""Runs a command with a temporary folder behind it, and ends it when nobody holds this program's input any more.

ComfyUI holds it, and so the command ends with ComfyUI, however that ends.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from tempfile import TemporaryDirectory

GRACE_SECONDS = 3.0
"""How long the command has before it is asked a second time, and then before it is killed."""


def run(command: Sequence[str]) -> int:
    """Run a command with the folder as its last argument, and return its exit code."""
    with TemporaryDirectory(prefix="wanforge-comfyui-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen([*command, folder], stdin=subprocess.DEVNULL)
        signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        threading.Thread(target=end_with_input, args=(process,), daemon=True).start()
        return process.wait()


def end_with_input(process: "subprocess.Popen[bytes]") -> None:
    """Wait for the end of the input, and end a process."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    for end in (process.terminate, process.terminate, process.kill):
        end()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
