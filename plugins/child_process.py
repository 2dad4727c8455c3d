"""Child processes that run a module of this package, for work that must not happen in this process."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

PR_SET_PDEATHSIG = 1
"""The call of prctl(2) that names the signal for the end of the parent."""


def start_module(
    module: str, *arguments: str, errors: IO[bytes], variables: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a module in a process that finds the modules which this one finds, with pipes for its input and output.

    The child has its own session, so that Ctrl-C reaches only this process, which then ends the child and its children
    (`kill_group`).

    Args:
        errors: Receives what it writes to stderr.
        variables: Environment variables that differ from those of this process.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={**os.environ, "PYTHONPATH": paths, **(variables or {})},
        start_new_session=True,
    )


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """End a child and its children immediately, whatever they are doing."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_with(parent: int) -> None:
    """Let the system kill this process when the thread that started it ends, and end it now if the parent has ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
