"""Child processes that tests send signals to."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent

# A process in the background ignores Ctrl-C, and so would its children.
ATTENTIVE = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"

STUCK = """
import torch
torch.set_num_threads(1)
print("stuck", flush=True)
torch.linalg.matrix_power(torch.eye(2000), 2**60 - 1)  # one call that takes far longer than any test waits
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended after a signal.

    Attributes:
        seconds: The time that it took.
        children: The child processes that it had, and which of them are still alive.
    """

    code: int
    stderr: str
    seconds: float
    children: list[psutil.Process]

    @property
    def survivors(self) -> list[psutil.Process]:
        _, alive = psutil.wait_procs(self.children, timeout=5)
        return [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


def free_port() -> int:
    """A port of this machine that nothing listens to."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def start(code: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """Run Python code in a child process."""
    return subprocess.Popen(
        [sys.executable, "-c", ATTENTIVE + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
    )


def command(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """Run the command line in a child process."""
    return start("from wanforge.cli import main\nmain()", *arguments, **environment)


def wait_for_line(process: "subprocess.Popen[str]") -> None:
    """Wait until a process has printed something, and then until it has begun what comes next."""
    assert process.stdout is not None
    assert process.stdout.readline(), process.communicate()[1]
    time.sleep(0.3)


def signalled(process: "subprocess.Popen[str]", *numbers: signal.Signals) -> Ended:
    """Send signals to a process, one shortly after the other, and wait for its end."""
    children = psutil.Process(process.pid).children(recursive=True)
    assert process.poll() is None, process.communicate()[1]
    begun = time.perf_counter()
    for place, number in enumerate(numbers):
        time.sleep(0.1 * (place > 0))
        process.send_signal(number)
    process.wait(timeout=60)
    seconds = time.perf_counter() - begun
    return Ended(process.returncode, process.communicate()[1], seconds, children)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
