"""The signals that the process which answers requests takes from its operator. Only for the main thread."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from wanforge.interrupts import SAID


class EarlySignals:
    """A handler that keeps the signals that it gets, for `told_of_signals`."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.numbers.append(number)


@contextmanager
def hangups_kept() -> Iterator[None]:
    """Keep a SIGHUP that arrives in the block until `told_of_signals` takes it, so that it does not end the process."""
    with ExitStack() as stack:
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(-1))
        stack.callback(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, EarlySignals()))
        yield


@contextmanager
def told_of_signals(tell: Callable[[int], object]) -> Iterator[None]:
    """Let the signals of `SAID` be told to a function, rather than end the process, while the block runs, and those
    that were kept before."""
    with ExitStack() as stack:
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(-1))
        for number in SAID:
            before = signal.signal(number, lambda number, frame: tell(number))
            stack.callback(signal.signal, number, before)
            for kept in before.numbers if isinstance(before, EarlySignals) else []:
                tell(kept)
        yield
