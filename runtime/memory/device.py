"""What a backend computes on, as far as memory is concerned: the host here, an NVIDIA GPU in `cuda`."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from wanforge.host.capacity import available_bytes

Event = Any
Work = Callable[[], None]


class Device(Protocol):
    """Computes and copies side by side. What a thread launches is done in order, and so are copies.

    Attributes:
        has_memory: Whether it has memory of its own, to which weights must be copied.
    """

    device: torch.device
    has_memory: bool

    def join(self) -> None:
        """Let the calling thread launch work in one order with the thread that has made this object."""
        ...

    def free_bytes(self) -> int:
        """The bytes of the device's memory that are free."""
        ...

    def pinned(self, size: int) -> Tensor | None:
        """Host memory that the device can copy from directly, or None where there is no more of it, or no need."""
        ...

    def prepare(self, copy: Callable[[], Event]) -> "Future[Event]":
        """Call a function that starts a copy, on the thread that does this for one copy after another."""
        ...

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event) -> Event:
        """Copy the second tensor of each pair into the first, beside the computing, once an event has happened.

        Returns:
            The event that marks the end of the copies.
        """
        ...

    def mark(self) -> Event:
        """Return an event that follows everything launched so far."""
        ...

    def wait(self, event: Event) -> None:
        """Make everything launched from now on wait for an event."""
        ...

    def record(self, work: Work) -> Work:
        """Record what a function launches, without running it; return a function that repeats it."""
        ...

    def synchronise(self) -> None:
        """Wait until everything launched has finished, including copies, and those that are still being prepared."""
        ...

    def reclaim(self) -> None:
        """Make memory that is no longer used available, once nothing is running that might use it."""
        ...


class Copies:
    """A thread that starts one copy after another.

    Args:
        begin: Is called on the thread before anything else.
    """

    def __init__(self, begin: Work | None = None) -> None:
        self._thread = ThreadPoolExecutor(1, "weights", begin)
        self._last: Future[Event] | None = None

    def start(self, copy: Callable[[], Event]) -> "Future[Event]":
        """Start a copy once those before it have been started."""
        self._last = self._thread.submit(copy)
        return self._last

    def finish(self) -> None:
        """Wait until every copy has been started, or has failed."""
        if self._last is not None:
            self._last.exception()


class Host:
    """The CPU, where a thread copies beside the one that computes, and everything launched is done at once."""

    device = torch.device("cpu")
    has_memory = False

    def __init__(self) -> None:
        self._copies = Copies()

    def join(self) -> None:
        return

    def free_bytes(self) -> int:
        return int(available_bytes())

    def pinned(self, size: int) -> Tensor | None:
        return None

    def prepare(self, copy: Callable[[], Event]) -> "Future[Event]":
        return self._copies.start(copy)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event) -> Event:
        for target, source in pairs:
            target.copy_(source)

    def mark(self) -> Event:
        return None

    def wait(self, event: Event) -> None:
        return

    def record(self, work: Work) -> Work:
        return work

    def synchronise(self) -> None:
        self._copies.finish()

    def reclaim(self) -> None:
        self.synchronise()
