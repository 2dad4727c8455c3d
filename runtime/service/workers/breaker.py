"""When a child that has died is started again."""

import time
from collections import deque
from collections.abc import Callable

from wanforge.runtime.service.workers.settings import Supervision


class Breaker:
    """Waits longer after each death in a row, and rests for long after too many of them.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, settings: Supervision, clock: Callable[[], float] = time.monotonic) -> None:
        self.times, self.most_deaths, self.clock = settings.times, settings.most_deaths, clock
        self.reason = ""
        self._deaths: deque[float] = deque(maxlen=settings.most_deaths)
        self._in_a_row = 0
        self._is_on_trial = False
        self._until = clock()

    @property
    def is_open(self) -> bool:
        """Whether the worker rests, because too many of its children died."""
        return bool(self.reason) and self.seconds_left > 0

    @property
    def seconds_left(self) -> float:
        """How long to wait before a child is started."""
        return max(0.0, self._until - self.clock())

    def died(self, how: str) -> None:
        """Note that a child has died. After a rest, a single death is enough for the next."""
        now = self.clock()
        self._deaths.append(now)
        self._in_a_row += 1
        pause = min(self.times.most_backoff, self.times.backoff * 2.0 ** (self._in_a_row - 1))
        is_full = len(self._deaths) == self.most_deaths and now - self._deaths[0] <= self.times.deaths
        if is_full or self._is_on_trial:
            count = len(self._deaths)
            self.reason = f"its process died {count} times, last because {how}; it is tried again after a rest"
            self._is_on_trial, pause = True, self.times.rest
        self._until = now + pause

    def succeeded(self) -> None:
        """Note that a child has made a clip, by which earlier deaths mean nothing any more."""
        self._in_a_row, self.reason, self._is_on_trial = 0, "", False
        self._deaths.clear()

    def reset(self) -> None:
        """Forget all deaths, because something was changed that may have been their cause."""
        self.succeeded()
        self._until = self.clock()
