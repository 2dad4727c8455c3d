"""A child as the supervisor sees it."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

from wanforge.plugins.child_process import kill_group, start_module
from wanforge.runtime.service.child.messages import (
    BundlePlace,
    Channel,
    SetUp,
    ShutDown,
    ToChild,
    ToSupervisor,
)
from wanforge.runtime.service.workers.settings import VISIBLE, Seat, Supervision

MODULE = "wanforge.runtime.service.child.child"
END_SECONDS = 5.0
"""How long a child may take to end in good order."""


class EndedError(Exception):
    """The child has ended; the message says how."""


class ChildProcess:
    """A child, which ends with the thread that has started it.

    Args:
        bundles: The bundles that it serves.

    Raises:
        EndedError: It cannot be started.
    """

    def __init__(self, settings: Supervision, seat: Seat, bundles: Sequence[BundlePlace]) -> None:
        try:
            with os.fdopen(os.dup(2), "wb") as errors:
                self._process = start_module(MODULE, str(os.getpid()), errors=errors, variables=variables(seat))
        except OSError as error:
            raise EndedError(f"it cannot be started ({error.strerror})") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # if it has ended, what follows will show it
            os.sched_setaffinity(self.pid, seat.processors)
        self._channel: Channel[ToSupervisor] = Channel(
            self._process.stdout.fileno(), self._process.stdin.fileno(), ToSupervisor
        )
        self._process.stdin.close()
        self._process.stdout.close()
        memory = settings.memory_gigabytes
        limit = None if memory is None else int(memory * 1e9)
        serve, threads = settings.serve, len(seat.processors)
        self.send(SetUp(settings.maker, tuple(bundles), serve.backend, limit, threads, serve.logs, seat.sharers))

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToChild) -> None:
        """Send a message. If the child has ended, `receive` will say so."""
        with suppress(OSError):
            self._channel.send(message)

    def receive(self, seconds: float, others: Sequence[int] = ()) -> ToSupervisor | None:
        """Wait for a message.

        Args:
            others: Descriptors that end the wait when they can be read.

        Raises:
            EndedError: The child has ended.
        """
        if not self._channel.wait(seconds, others):
            return None
        try:
            return self._channel.receive()
        except (EOFError, OSError):
            raise EndedError(self._how_it_ended()) from None

    def kill(self) -> None:
        """End it at once, with all its children."""
        kill_group(self._process)
        self._process.wait()
        self._channel.close()

    def end(self) -> None:
        """Let it end in good order, or end it if that takes too long."""
        self.send(ShutDown())
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self.kill()

    def _how_it_ended(self) -> str:
        """How it ended, once it has."""
        end = time.monotonic() + END_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        status = self._process.poll()
        if status is None:
            return "it closed its pipes"
        if status == -signal.SIGKILL:
            return "it was killed, perhaps because memory ran out"
        return f"it was ended by signal {-status}" if status < 0 else f"it ended with status {status}"


def variables(seat: Seat) -> dict[str, str]:
    """The environment of a child, besides that of the supervisor."""
    threads = {"OMP_NUM_THREADS": str(len(seat.processors)), "OMP_WAIT_POLICY": "PASSIVE"}
    return {VISIBLE: seat.gpu, **threads} if seat.gpu else threads
