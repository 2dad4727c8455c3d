"""Heartbeats: they keep the leases of running jobs, tell how far the jobs are, and learn which of them are to stop.

They come from a thread of the supervisor, so neither a launch that takes long nor a result that is being stored delays
them.
"""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from threading import Event, Lock, Thread

from wanforge.runtime.service.job import Job
from wanforge.runtime.service.store.base import SOON, JobStore, StoreError
from wanforge.runtime.service.tracing.attempts import TracedAttempt
from wanforge.runtime.service.workers.settings import WorkTimes

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""The longest time from one look at the running jobs to the next."""


class Stop(StrEnum):
    """Why an attempt is to stop."""

    CANCELLED = "cancelled"
    LEASE_LOST = "lease_lost"
    SERVICE_ENDS = "service_ends"


@dataclass(eq=False)
class Attempt:
    """A job that is running.

    Attributes:
        wake: Called when it is to stop.
        folder: Where the child makes the clip.
        has_begun: Whether the child has begun it.
        moved_at: When its progress was last heard of, and `beaten_at`, when its last heartbeat was sent; by the
            monotonic clock.
        stop: Why it is to stop, if it is.
        previews: Names of the objects that show how far it is.
        traced: What it notes for its trace.
    """

    job: Job
    wake: Callable[[], None]
    folder: Path
    has_begun: bool = False
    stage: str | None = None
    percent: int = 0
    moved_at: float = field(default_factory=time.monotonic)
    beaten_at: float = field(default_factory=time.monotonic)
    stop: Stop | None = None
    told: tuple[str | None, int] = (None, 0)
    previews: list[str] = field(default_factory=list)
    traced: TracedAttempt = field(init=False)

    def __post_init__(self) -> None:
        self.traced = TracedAttempt(self.job)

    @property
    def ticket(self) -> str:
        """What messages call it."""
        return f"{self.job.id}/{self.job.attempt}"

    @property
    def now(self) -> tuple[str | None, int]:
        """How far it is."""
        return self.stage, self.percent

    def advance(self, stage: str, percent: int) -> None:
        """Note progress."""
        self.stage, self.percent, self.moved_at = stage, percent, time.monotonic()

    def end(self, reason: Stop) -> None:
        """Let it stop. The first reason counts, but where the lease is lost nothing else does."""
        if self.stop is None or reason is Stop.LEASE_LOST:
            self.stop = reason
            self.wake()


class Heart:
    """Sends the heartbeats of all running jobs."""

    def __init__(self, store: JobStore, times: WorkTimes) -> None:
        self.store, self.times = store, times
        self._attempts: dict[str, Attempt] = {}
        self._changing, self._ends = Lock(), Event()
        self._thread = Thread(target=self._beat, name="heart", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ends.set()
        self._thread.join()

    def add(self, attempt: Attempt) -> None:
        """Begin to send heartbeats for an attempt."""
        with self._changing:
            self._attempts[attempt.ticket] = attempt

    def remove(self, attempt: Attempt) -> None:
        """Stop sending them."""
        with self._changing:
            self._attempts.pop(attempt.ticket, None)

    def attempts(self) -> list[Attempt]:
        """The attempts that are running."""
        with self._changing:
            return list(self._attempts.values())

    def _beat(self) -> None:
        while not self._ends.is_set():
            try:
                with closing(self.store.news(of_progress=False)) as news:
                    while not self._ends.is_set():
                        has_news = news.wait(min(LOOK_SECONDS, self.times.progress), SOON)
                        for attempt in self.attempts():
                            self._look(attempt, has_news=has_news)
            except StoreError as error:
                log.warning("Heartbeats cannot be sent: %s", error)
                self._ends.wait(min(1.0, self.times.heartbeat))
            except Exception:  # without heartbeats, every job would be lost
                log.exception("Heartbeats have failed.")
                self._ends.wait(min(1.0, self.times.heartbeat))

    def _look(self, attempt: Attempt, *, has_news: bool) -> None:
        """Send a heartbeat if it is time for one; otherwise see whether the job is to be cancelled, if something has
        changed in the store."""
        since = time.monotonic() - attempt.beaten_at
        has_moved = attempt.now != attempt.told and since >= self.times.progress
        if has_moved or since >= self.times.heartbeat:
            self._send(attempt)
        elif has_news and attempt.stop is None:
            job = self.store.get(attempt.job.id)
            if job is not None and job.lease == attempt.job.lease and job.cancel_requested:
                attempt.end(Stop.CANCELLED)

    def _send(self, attempt: Attempt) -> None:
        now = attempt.now
        pulse = self.store.heartbeat(attempt.job.lease, *now)
        attempt.told, attempt.beaten_at = now, time.monotonic()
        if attempt not in self.attempts():
            return  # it has ended in the meantime
        if not pulse.is_held:
            attempt.end(Stop.LEASE_LOST)
        elif pulse.cancel_requested:
            attempt.end(Stop.CANCELLED)
