"""Making a clip: submitted, watched, and cancelled if nobody wants it any more."""

import asyncio
import io
import logging
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, TypeVar

from PIL import Image

from .connection import Connection, Fields
from .errors import NodeError
from .host import Host

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""How often it is looked whether the user has interrupted the workflow."""
FAREWELL_SECONDS = 5.0
"""How long an interrupted node waits for the server to hear of it."""

Answer = TypeVar("Answer")


async def interruptible(host: Host, work: Awaitable[Answer]) -> Answer:
    """Wait for something, unless the user interrupts the workflow."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            host.check()
            await asyncio.wait({task}, timeout=LOOK_SECONDS)
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def make(host: Host, server: Connection, fields: Fields, picture: bytes | None = None) -> bytes:
    """The mp4 of a clip.

    If the node ends before it has it, because the user interrupts it or for any other reason, the job is cancelled.

    Raises:
        NodeError: The clip was not made.
    """
    submission = asyncio.ensure_future(server.submit(fields, picture))
    try:
        video = (await asyncio.shield(submission))["id"]
        done = await server.wait(video, Viewer(host, server, video))
        if done["status"] != "completed":
            raise NodeError(words(done))
        return await server.content(video)
    except BaseException:
        await cancel(server, submission)
        raise


async def cancel(server: Connection, submission: "asyncio.Task[dict[str, Any]]") -> None:
    """Cancel what was submitted, or is just being. One that has ended stays as it is."""

    async def cancelled() -> None:
        await server.cancel((await submission)["id"])

    with suppress(Exception):
        await asyncio.wait_for(cancelled(), FAREWELL_SECONDS)
        return
    if submission.done() and not submission.cancelled() and submission.exception() is None:
        log.warning("%s could not be told to cancel %s.", server.url, submission.result()["id"])


class Viewer:
    """Shows how far a clip is, with pictures of it if the server has any."""

    def __init__(self, host: Host, server: Connection, video: str) -> None:
        self.host, self.server, self.video = host, server, video
        self.shown = ""

    async def __call__(self, event: dict[str, Any]) -> None:
        stage = str(event.get("stage", ""))
        picture = None
        if stage != self.shown and stage.startswith(("step ", "preview ", "decode")):
            picture, self.shown = await self._picture(), stage
        await self.host.show(float(event.get("progress", 0)), picture)

    async def _picture(self) -> Image.Image | None:
        """The latest picture; None if there is none."""
        try:
            found = Image.open(io.BytesIO(await self.server.content_now(self.video, "preview")), formats=["WEBP"])
            return found.convert("RGB")
        except Exception as error:  # nothing depends on a preview, neither on its absence nor on a damaged one
            log.debug("There is no preview: %s", error)
            return None


def words(video: dict[str, Any]) -> str:
    """Why a video was not made."""
    error = video.get("error") or {}
    if error:
        return f"the server could not make the clip: {error.get('message')} ({error.get('code')})"
    return f"the clip was {video['status']} on the server"
