"""The answer that is a live stream: an mp4 that grows until the stream ends."""

import logging
from collections.abc import Callable

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from wanforge.runtime.service.job import Job
from wanforge.runtime.service.store.base import StoreError
from wanforge.runtime.service.web.state import Service
from wanforge.runtime.service.web.streams.screens import BrokenOffError, Screen

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How often a stream that waits for a worker looks whether its job has ended."""
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
VIDEO_ID = "Video-Id"
"""The header that names the video of a stream."""


class LiveResponse(Response):
    """Shows the stream of a job to one client, for as long as the client is there. The status comes at once, and the
    video when a worker is free.

    If the stream breaks off, the connection is cut before the end of the body, so that nobody takes for whole what is
    not. If the client leaves, the stream ends, and what was shown is kept; a job that has not begun is cancelled.
    """

    def __init__(self, service: Service, job: Job, screen: Screen) -> None:
        super().__init__(headers={**HEADERS, VIDEO_ID: job.id}, media_type="video/mp4")
        del self.headers["content-length"]
        self.service, self.job, self.screen = service, job, screen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(when_gone, receive, group.cancel_scope.cancel)
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await self._show(send)
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._leave()

    async def _show(self, send: Send) -> None:
        while not await self.screen.arrived(LOOK_SECONDS):
            if self.screen.is_over or self.service.screens.is_ending or not await self._may_arrive():
                return
        try:
            async for data in self.screen.pieces():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except BrokenOffError:
            log.warning("%s has broken off.", self.job.id, extra={"job": self.job.id})
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _may_arrive(self) -> bool:
        """Whether the job of a stream has not ended, as far as is known."""
        try:
            job = await self.service.reading(self.service.store.get, self.job.id)
        except StoreError as error:
            log.warning("%s waits for the job store: %s", self.job.id, error, extra={"job": self.job.id})
            return True
        return job is not None and not job.state.is_terminal

    async def _leave(self) -> None:
        """Let nobody watch any more. A stream that has arrived is ended by that; another attempt of its job would find
        no screen."""
        was_shown = self.screen.is_connected
        self.screen.close()
        try:
            if not was_shown:
                await self.service.in_thread(self.service.store.cancel, self.job.id)
        except StoreError as error:  # the job ends when it finds no screen
            log.warning("%s could not be cancelled: %s", self.job.id, error, extra={"job": self.job.id})
        finally:
            self.service.screens.forget(self.screen, self.job.id)


async def when_gone(receive: Receive, act: Callable[[], object]) -> None:
    """Do something once a client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    act()
