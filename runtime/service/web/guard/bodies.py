"""Bounds on the body of a request: how large it may be, and how slowly it may come."""

import asyncio
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanforge.runtime.service.settings import MEGABYTE
from wanforge.runtime.service.web.errors import ApiError

PATIENCE = 30.0
"""Seconds that every body may take."""
SLOWEST = 10_000
"""Bytes that have to come in each further second."""


class Bounded:
    """Refuses bodies that are too large or too slow, as soon as that is known.

    Args:
        most: The most bytes of a body.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        came, begun, is_whole = 0, monotonic(), False

        async def receiving() -> Message:
            nonlocal came, is_whole
            if is_whole:  # what comes now is that the client has left, for which there is no hurry
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), begun + PATIENCE + came / SLOWEST - monotonic())
            except TimeoutError:
                raise ApiError(408, "too_slow", f"the body comes too slowly; {came} bytes came in time") from None
            came += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if came > self.most:
                raise ApiError(413, "too_large", f"the body is larger than {self.most / MEGABYTE:g} MB")
            return message

        await self.app(scope, receiving, send)
