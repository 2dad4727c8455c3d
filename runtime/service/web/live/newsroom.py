"""Events of jobs for those who follow them. One thread reads what is new, and reads it once for all of them."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from wanforge.runtime.service.job import JobEvent
from wanforge.runtime.service.store.base import SOON, JobStore, StoreError

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the thread that waits for news looks whether the server ends."""

News = dict[str, list[JobEvent] | None]
"""New events by job; None for a job that is gone."""


class Feed:
    """What one follower is told of a job."""

    def __init__(self) -> None:
        self._news: asyncio.Queue[list[JobEvent] | None] = asyncio.Queue()

    async def next(self, seconds: float) -> list[JobEvent] | None:
        """Wait for events. Some of them may have been told before.

        Returns:
            Nothing if there are none within some time, and None if there will never be any.
        """
        with suppress(TimeoutError):
            return await asyncio.wait_for(self._news.get(), seconds)
        return []

    def tell(self, events: list[JobEvent] | None) -> None:
        self._news.put_nowait(events)


class Newsroom:
    """Tells followers what happens to their jobs. Except for its thread, everything happens in the event loop."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self._feeds: dict[str, set[Feed]] = {}
        self._told: dict[str, int] = {}
        self._changing = threading.Lock()
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Begin to watch; to be called in the event loop."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._watch, args=(loop,), name="news", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tell all followers that there is nothing more to come."""
        self._ends.set()
        self._tell(dict.fromkeys(self._feeds))

    @contextmanager
    def following(self, job: str, after: int) -> Iterator[Feed]:
        """Follow a job while the block runs: the feed has all events that are committed from now on. Earlier ones have
        to be read after the block has begun.

        Args:
            after: The sequence of an event that the job has had, or 0.
        """
        feed = Feed()
        with self._changing:
            self._feeds.setdefault(job, set()).add(feed)
            self._told.setdefault(job, after)
        if self._ends.is_set():
            feed.tell(None)
        try:
            yield feed
        finally:
            with self._changing:
                self._feeds[job].discard(feed)
                if not self._feeds[job]:
                    del self._feeds[job], self._told[job]

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._ends.is_set():
            try:
                with closing(self.store.news()) as news:
                    is_behind = True  # something may have happened before the news were opened
                    while not self._ends.is_set():
                        if is_behind and (found := self._read()):
                            with suppress(RuntimeError):  # the server may have ended meanwhile, and its loop with it
                                loop.call_soon_threadsafe(self._tell, found)
                        is_behind = news.wait(LOOK_SECONDS, SOON)
            except StoreError as error:
                log.warning("Followers of jobs are told nothing for now: %s", error)
                self._ends.wait(LOOK_SECONDS)
            except Exception:  # without this thread, no stream would be told of anything
                log.exception("Following the jobs has failed.")
                self._ends.wait(LOOK_SECONDS)

    def _read(self) -> News:
        """What has happened to followed jobs since it was read last."""
        with self._changing:
            told = dict(self._told)
        latest = self.store.latest(told)
        found: News = {job: None for job in told if job not in latest}
        for job, last in latest.items():
            if last > told[job]:
                found[job] = every_event(self.store, job, told[job])
        with self._changing:  # once everything is read, so that nothing is missed where that fails halfway
            for job, events in found.items():
                if job in self._told and events:
                    self._told[job] = events[-1].sequence
        return found

    def _tell(self, news: News) -> None:
        for job, events in news.items():
            for feed in self._feeds.get(job, ()):
                feed.tell(events)


def every_event(store: JobStore, job: str, after: int) -> list[JobEvent]:
    """The events of a job after one of them, however many there are."""
    found: list[JobEvent] = []
    while some := store.events(job, found[-1].sequence if found else after):
        found += some
    return found
