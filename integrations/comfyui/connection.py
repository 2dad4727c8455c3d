"""A connection to a server with `/v1/videos`, which outlives the server's restarts."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import aiohttp

from .errors import RefusedError, UnreachableError, refused
from .places import is_here, key_of

log = logging.getLogger(__name__)

PATIENCE = 120.0
"""Seconds for which a server may be away, or too busy, before a node gives up."""
FIRST_PATIENCE = 3.0
"""The same for the first look at a server, which should say soon that none is there."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.25, 5.0
AGAIN = {429, 502, 503, 504}
"""The statuses after which it is worth trying again."""
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
"""A quiet stream of events has a comment every 15 seconds."""
TERMINAL = {"completed", "failed", "cancelled", "expired"}
VIDEOS = "/v1/videos"

Fields = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], Awaitable[None]]
"""Told what each event says."""
Answer = TypeVar("Answer")


class Connection:
    """A server, as long as the block of `connected` runs.

    Attributes:
        patience: Seconds for which the server may be away.
        check: Raises a `NodeError` if the server will not come back.
        heard: When there was the latest sign of it, by the monotonic clock.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, check: Callable[[], None], patience: float) -> None:
        self.session, self.url, self.check, self.patience = session, url, check, patience
        self.heard = 0.0

    async def models(self) -> list[dict[str, Any]]:
        """The models that are served; the first one is the default."""
        found: list[dict[str, Any]] = (await self._tried(lambda: self._json("GET", "/v1/models", "data")))["data"]
        return found

    async def submit(self, fields: Fields, picture: bytes | None) -> dict[str, Any]:
        """Submit a video. Sending it again after a broken connection makes no second one."""
        headers = {"Idempotency-Key": secrets.token_hex(16)}

        def sent() -> Awaitable[dict[str, Any]]:
            form = aiohttp.FormData(default_to_multipart=True)
            for name, value in fields.items():
                form.add_field(name, str(value))
            if picture is not None:
                form.add_field("input_reference", picture, filename="image.png", content_type="image/png")
            return self._json("POST", VIDEOS, "id", data=form, headers=headers)

        return await self._tried(sent)

    async def cancel(self, video: str) -> None:
        """Cancel a video, even if it is being made."""
        await self._json("POST", f"{VIDEOS}/{video}/cancel", "status")

    async def wait(self, video: str, watch: Watch) -> dict[str, Any]:
        """Wait until a video has ended, however often the connection breaks."""
        last = "0"

        async def watched() -> dict[str, Any]:
            nonlocal last
            async for number, event in self._events(video, last):
                last = number
                await watch(event)
            return await self._json("GET", f"{VIDEOS}/{video}", "status")

        while (found := await self._tried(watched))["status"] not in TERMINAL:
            await asyncio.sleep(1)  # the stream was closed before the end
        return found

    async def content(self, video: str, variant: str = "video") -> bytes:
        """What a video has become, or a picture of it."""
        return await self._tried(lambda: self.content_now(video, variant))

    async def content_now(self, video: str, variant: str) -> bytes:
        """The same, asked for once."""
        async with self._answer("GET", f"{VIDEOS}/{video}/content", params={"variant": variant}) as response:
            return await response.read()

    async def _events(self, video: str, last: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The events of a video after one, with their numbers."""
        number = last
        async with self._answer("GET", f"{VIDEOS}/{video}/events", headers={"Last-Event-ID": last}) as response:
            async for line in response.content:
                self.heard = time.monotonic()
                name, _, value = line.decode(errors="replace").strip().partition(": ")
                if name == "id":
                    number = value
                elif name == "data":
                    with suppress(ValueError):  # the connection broke within a line
                        yield number, json.loads(value)

    async def _json(self, method: str, path: str, key: str, **options: Any) -> dict[str, Any]:
        """The answer to a request that is sent once: an object with a key.

        Raises:
            RefusedError: The server refuses it, or is no server of this kind.
        """
        async with self._answer(method, path, **options) as response:
            found = await body_of(response)
            if not isinstance(found, dict) or key not in found:
                raise refused(self.url, response.status, None, None)
            return found

    @asynccontextmanager
    async def _answer(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer that is no refusal. Redirections are none, because the key is for one address."""
        async with self.session.request(method, self.url + path, allow_redirects=False, **options) as response:
            if response.status >= 300:
                raise refused(self.url, response.status, await body_of(response), pause_wished(response))
            yield response

    async def _tried(self, send: Callable[[], Awaitable[Answer]]) -> Answer:
        """Send something until there is an answer to it.

        Raises:
            RefusedError: The server refuses it.
            UnreachableError: The server was away for too long.
        """
        problem: Exception
        pause, self.heard = SHORTEST_PAUSE, time.monotonic()
        while True:
            try:
                return await send()
            except RefusedError as error:
                if error.status not in AGAIN or self.has_gone:
                    raise
                problem, wish = error, error.retry_after
            except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError, too
                problem, wish = error, None
            self.check()
            if self.has_gone:
                raise UnreachableError(f"{self.url} cannot be reached ({problem}); {ADVICE}") from None
            log.warning("%s does not answer now (%s). Trying again for up to %.0f s.", self.url, problem, self.patience)
            await asyncio.sleep(pause if wish is None else wish)
            pause = min(LONGEST_PAUSE, 2 * pause)

    @property
    def has_gone(self) -> bool:
        """Whether nothing was heard of the server for too long."""
        return time.monotonic() - self.heard >= self.patience


ADVICE = "check the address and that the server runs: wanforge serve BUNDLE"


def nothing() -> None:
    """The check for a server that somebody else runs."""


@asynccontextmanager
async def connected(
    url: str, check: Callable[[], None] = nothing, patience: float | None = None
) -> AsyncIterator[Connection]:
    """A connection that is closed with the block."""
    key = key_of(url)
    headers = {"User-Agent": "wanforge-comfyui"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    async with aiohttp.ClientSession(headers=headers, timeout=TIMEOUT, trust_env=not is_here(url)) as session:
        yield Connection(session, url, check, PATIENCE if patience is None else patience)


async def body_of(response: aiohttp.ClientResponse) -> Any:
    """The JSON of an answer; None if it is none."""
    try:
        return json.loads(await response.read())
    except ValueError:
        return None


def pause_wished(response: aiohttp.ClientResponse) -> float | None:
    """The seconds after which a server wants to be asked again, up to `LONGEST_PAUSE`."""
    try:
        return min(max(float(response.headers["Retry-After"]), 0.0), LONGEST_PAUSE)
    except (KeyError, ValueError):
        return None
