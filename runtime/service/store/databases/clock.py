"""The running time of a store, which it keeps itself (`base` states the rule)."""

from dataclasses import dataclass

from wanforge.runtime.service.store.base import LARGEST_STEP, SETTLING, SMALLEST_JUMP

COARSENESS = 1.0
"""Seconds of running time that need not be written where nothing else changes."""


@dataclass(frozen=True)
class StoreTime:
    """The time of a transaction.

    Attributes:
        wall: Seconds since 1970.
        running: Running time.
        settled: Running time at which the wall clock is to be believed again.
    """

    wall: float
    running: float
    settled: float

    @property
    def is_settled(self) -> bool:
        """Whether it has been long enough since the wall clock jumped ahead for things to expire."""
        return self.running >= self.settled

    def at(self, wall: float) -> "StoreTime":
        """The time at the next use of the store."""
        passed = wall - self.wall
        running = self.running + min(max(passed, 0.0), LARGEST_STEP)
        return StoreTime(wall, running, running + SETTLING if passed >= SMALLEST_JUMP else self.settled)

    def is_worth_writing(self, before: "StoreTime") -> bool:
        """Whether to write this time though nothing else is written. Otherwise, idle workers would wake each other."""
        return abs(self.wall - before.wall) >= COARSENESS
