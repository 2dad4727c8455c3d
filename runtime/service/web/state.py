"""What the routes share: settings, the job store, results, the catalogue, and what changes while clients look."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread
from fastapi import Request

from wanforge.runtime.service.catalogue import Catalogue
from wanforge.runtime.service.fetching.fetcher import Fetcher
from wanforge.runtime.service.machines.crew import crew_of
from wanforge.runtime.service.results.base import ObjectStorage
from wanforge.runtime.service.settings import MEGABYTE, ServeSettings
from wanforge.runtime.service.store.base import JobStore, StoreError
from wanforge.runtime.service.web.live.newsroom import Newsroom
from wanforge.runtime.service.web.live.outlook import Outlook
from wanforge.runtime.service.web.monitor.answers import AnswerFigures
from wanforge.runtime.service.web.streams.screens import Screens
from wanforge.runtime.service.workers.status import obstacles_of

READERS = 4
"""The number of threads that read for clients who look at videos."""
Arguments = ParamSpec("Arguments")
Found = TypeVar("Found")

UNLOCKED_SECONDS = 10.0
"""How long a server without keys does not look whether there are any."""
FETCHED_AT_ONCE = 8
"""How many pictures are fetched at once."""
LARGE_AT_ONCE = 2
"""How many pictures and batches are checked at once."""
LARGE = 100_000
"""Bytes from which on the event loop is not to be held up by something."""


class Service:
    """Everything that a request needs.

    Attributes:
        crew: Tells the workers that there are.
        needs_keys: Whether there are API keys, so that every request has to show one.
        streams: How many event streams each key has open.
        screens: Where live streams arrive.
        fetcher: Fetches pictures by their URLs; None where that is not allowed.
    """

    def __init__(self, settings: ServeSettings, store: JobStore, catalogue: Catalogue, objects: ObjectStorage) -> None:
        self.settings, self.store, self.catalogue, self.objects = settings, store, catalogue, objects
        self.reload_keys()
        self.crew, self.newsroom = crew_of(settings, store), Newsroom(store)
        self.outlook, self.answers = Outlook(store, self.crew), AnswerFigures()
        self._readers = anyio.CapacityLimiter(READERS)
        self.streams: Counter[str] = Counter()
        self.screens = Screens(Path(settings.data))
        limits = settings.limits
        most = int(limits.body_megabytes * MEGABYTE)
        self.fetcher = Fetcher(limits.image_hosts, most) if limits.image_hosts else None
        self.fetching = anyio.Semaphore(FETCHED_AT_ONCE)
        self.large = anyio.CapacityLimiter(LARGE_AT_ONCE)
        self.started_at = time.time()

    def reload_keys(self) -> None:
        """Look again whether there are keys. A server whose keys are all revoked lets nobody in."""
        self.needs_keys = bool(self.store.api_keys())
        self._unlocked_until = time.monotonic() + UNLOCKED_SECONDS

    async def asks_for_keys(self) -> bool:
        """Whether a request has to show a key. The first key may be made after the server was started."""
        if not self.needs_keys and time.monotonic() >= self._unlocked_until:
            self._unlocked_until = time.monotonic() + UNLOCKED_SECONDS  # so that of many requests one looks
            with suppress(StoreError):  # whatever needs the store says so itself
                await self.in_thread(self.reload_keys)
        return self.needs_keys

    def obstacles(self) -> list[str]:
        """Why videos cannot be made; empty if they can."""
        try:
            self.store.census()
        except StoreError as error:
            return [str(error)]
        return obstacles_of(self.crew())

    async def in_own_thread(
        self, function: Callable[Arguments, Found], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Found:
        """Call something that takes much memory or time, such as drawing a picture, beside few others of its kind, so
        that the threads for everything else stay free."""
        return await anyio.to_thread.run_sync(lambda: function(*arguments, **options), limiter=self.large)

    async def by_size(
        self, size: int, function: Callable[Arguments, Found], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Found:
        """Call something that takes long only for large data: at once, or `in_own_thread` if the data is large."""
        if size < LARGE:
            return function(*arguments, **options)
        return await self.in_own_thread(function, *arguments, **options)

    async def in_thread(
        self, function: Callable[Arguments, Found], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Found:
        """Call something that may block, such as the store, in another thread."""
        return await anyio.to_thread.run_sync(lambda: function(*arguments, **options))

    async def reading(
        self, function: Callable[Arguments, Found], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Found:
        """Call something that reads a little, in one of few threads. More of them would mostly wait for Python's lock,
        and each of hundreds of clients that look at the same moment would wait for all others."""
        return await anyio.to_thread.run_sync(lambda: function(*arguments, **options), limiter=self._readers)


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    found: Service = request.app.state.service
    return found
