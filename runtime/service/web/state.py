"""What the routes share: the settings, the job store, the results, the catalogue, and news for those who wait."""

import asyncio
import threading
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
from wanforge.runtime.service.results.base import ObjectStorage
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.base import JobStore, StoreError
from wanforge.runtime.service.workers.status import obstacles, read_status

Arguments = ParamSpec("Arguments")
Found = TypeVar("Found")

LOOK_SECONDS = 1.0
"""How often the thread that waits for news looks whether the server ends."""

FETCHED_AT_ONCE = 8
"""How many pictures are fetched at once."""
LARGE_AT_ONCE = 2
"""How many pictures and batches are checked at once."""


class Service:
    """Everything that a request needs.

    Attributes:
        needs_keys: Whether there are API keys, so that every request has to show one.
        streams: How many event streams each key has open.
    """

    def __init__(self, settings: ServeSettings, store: JobStore, catalogue: Catalogue, objects: ObjectStorage) -> None:
        self.settings, self.store, self.catalogue, self.objects = settings, store, catalogue, objects
        self.reload_keys()
        self.newsroom = Newsroom(store)
        self.streams: Counter[str] = Counter()
        self.fetching = anyio.Semaphore(FETCHED_AT_ONCE)
        self.large = anyio.CapacityLimiter(LARGE_AT_ONCE)
        self.started_at = time.time()

    def reload_keys(self) -> None:
        """Look again whether there are keys. A server whose keys are all revoked lets nobody in."""
        self.needs_keys = bool(self.store.api_keys())

    def makers(self) -> int:
        """How many workers make clips."""
        status = read_status(Path(self.settings.data))
        return max(1, 0 if status is None else len(status.workers))

    def obstacles(self) -> list[str]:
        """Why videos cannot be made; empty if they can."""
        try:
            self.store.census()
        except StoreError as error:
            return [str(error)]
        return obstacles(Path(self.settings.data))

    async def in_own_thread(
        self, function: Callable[Arguments, Found], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Found:
        """Call something that takes much memory or time, such as drawing a picture, beside few others of its kind, so
        that the threads for everything else stay free."""
        return await anyio.to_thread.run_sync(lambda: function(*arguments, **options), limiter=self.large)

    async def in_thread(
        self, function: Callable[Arguments, Found], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> Found:
        """Call something that may block, such as the store, in another thread."""
        return await anyio.to_thread.run_sync(lambda: function(*arguments, **options))


class Newsroom:
    """Wakes coroutines when something has changed in the store: one thread waits for all of them."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self.edition = 0
        self._changed = asyncio.Event()
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Begin to watch; to be called in the event loop."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._watch, args=(loop,), name="news", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ends.set()
        self._publish()

    async def wait(self, edition: int, seconds: float) -> int:
        """Wait until there is a later edition than one, or some time has passed. Returns the latest edition."""
        if self.edition == edition and not self._ends.is_set():
            changed = self._changed
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), seconds)
        return self.edition

    @property
    def is_closed(self) -> bool:
        return self._ends.is_set()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        news = self.store.news()
        try:
            while not self._ends.is_set():
                try:
                    if not news.wait(LOOK_SECONDS):
                        continue
                except StoreError:
                    self._ends.wait(LOOK_SECONDS)
                    continue
                with suppress(RuntimeError):  # the server may have ended meanwhile, and its loop with it
                    loop.call_soon_threadsafe(self._publish)
        finally:
            news.close()

    def _publish(self) -> None:
        self.edition += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    found: Service = request.app.state.service
    return found
