"""What is expected of the queue: the place of each job, and how long jobs of a kind take.

Many clients ask for it all the time, and each answer would read the whole queue. So it is looked up for all of them at
once, and anew when that takes no more than a small share of the time.
"""

import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Generic, TypeVar

from wanforge.runtime.service.machines.crew import Crew
from wanforge.runtime.service.store.base import DurationKey, JobStore
from wanforge.runtime.service.workers.status import LOST

SHARE = 0.005
"""The share of the time of one thread that looking it up may take."""

Found = TypeVar("Found")


class Kept(Generic[Found]):
    """What a function returns, kept until calling it again takes no more than `SHARE` of the time.

    Args:
        least_seconds: How long it is kept at least.
    """

    def __init__(self, look: Callable[[], Found], least_seconds: float = 0.0) -> None:
        self._look, self._least_seconds = look, least_seconds
        self._looking = threading.Lock()
        self._found: Found | None = None
        self._until = 0.0

    @property
    def is_fresh(self) -> bool:
        """Whether it need not be looked up yet."""
        return time.monotonic() < self._until

    def get(self) -> Found:
        """What was returned last, or is now. While one thread calls the function, others do not wait for it."""
        found = self._found
        if found is not None and (self.is_fresh or self._looking.locked()):
            return found
        with self._looking:
            if self._found is None or not self.is_fresh:
                begun = time.monotonic()
                self._found = self._look()
                done = time.monotonic()
                self._until = done + max(self._least_seconds, (done - begun) / SHARE)
            return self._found


class Outlook:
    """What is expected of a queue. Every thread may ask.

    Args:
        crew: Tells the workers.
    """

    def __init__(self, store: JobStore, crew: Crew) -> None:
        self.store, self.crew = store, crew
        self._places = Kept(store.positions)
        self._makers = Kept(self._count_makers, least_seconds=1.0)
        self._usual = Kept[dict[DurationKey, float | None]](dict, least_seconds=1.0)

    def has_place(self, job: str) -> bool:
        """Whether the place of a job is known without looking it up."""
        return self._places.is_fresh and job in self._places.get()

    def position(self, job: str) -> int | None:
        """About how many jobs will start before a queued one does."""
        found = self._places.get().get(job)
        return self.store.position(job) if found is None else found

    def usual_seconds(self, kind: DurationKey) -> float | None:
        """How long jobs of a kind take; None if none was made yet."""
        known = self._usual.get()
        if kind not in known:
            seconds = self.store.durations(kind)
            known[kind] = median(seconds) if seconds else None
        return known[kind]

    def makers(self) -> int:
        """How many workers make clips."""
        return self._makers.get()

    def _count_makers(self) -> int:
        status = self.crew()
        return max(1, 0 if status is None else sum(worker.state != LOST for worker in status.workers))
