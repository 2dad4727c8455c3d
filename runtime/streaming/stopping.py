"""Ending a stream by a signal in good order, because an endless one has no other end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from types import FrameType

from wanforge.interrupts import SAID, Interrupted, end

PATIENCE_SECONDS = 10.0
"""How long ending in good order may take: a chunk may have to be decoded, and a slow reader may have to read."""


@contextmanager
def ended_in_good_order() -> Iterator[None]:
    """Let the first signal that asks the process to end raise an exception in the block, which then has a while to end.
    After that while, or with a second signal, the process ends at once. Only for the main thread, which must not stay
    in a library for long.

    Raises:
        Interrupted: (In the block.) A signal has arrived.
    """
    timers: list[Timer] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if timers:
            end(number)
        timer = Timer(PATIENCE_SECONDS, end, [number])
        timer.daemon = True
        timers.append(timer)
        timer.start()
        raise Interrupted(number)

    heeded = [number for number in SAID if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heeded}
    wakes = signal.set_wakeup_fd(-1)  # which would end the process sooner
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
