"""The signals that the process which answers requests takes from its operator. Only for the main thread."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from wanforge.interrupts import SAID


@contextmanager
def hangups_kept() -> Iterator[None]:
    """Keep a SIGHUP that arrives in the block until `told_of_signals` takes it, so that it does not end the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def told_of_signals(tell: Callable[[int], object]) -> Iterator[None]:
    """Let the signals of `SAID` be told to a function, rather than end the process, while the block runs."""
    with ExitStack() as stack:
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(-1))
        for number in SAID:
            stack.callback(signal.signal, number, signal.signal(number, lambda number, frame: tell(number)))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SAID)
        yield
