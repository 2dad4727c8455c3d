"""Bounds on the body of a request: how large it may be, and how slowly it may come."""

import asyncio
from collections.abc import Callable
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanforge.runtime.service.settings import MEGABYTE
from wanforge.runtime.service.web.forms.errors import ApiError

PATIENCE = 30.0
"""Seconds that every body may take."""
SLOWEST = 10_000
"""Bytes that have to come in each further second."""
SMALL = 100_000
"""Bytes of each body that do not count among those that are held at once, so that small requests always find room."""
LARGEST_AT_ONCE = 4
"""How many of the largest bodies may be held at once. Each takes several times its size in memory."""
AGAIN_SECONDS = 2


class Bounded:
    """Refuses bodies that are too large or too slow, or too many at once, as soon as that is known.

    Args:
        most: The most bytes of a body.

    Attributes:
        held: The bytes of all bodies whose requests have not begun to be answered yet, without those that are small.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most, self.held = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held, is_answered = 0, False

        def hold(came: int) -> None:
            nonlocal held
            if is_answered:
                return
            more = max(0, came - SMALL) - held
            if self.held + more > LARGEST_AT_ONCE * self.most:
                raise ApiError(
                    503, "too_busy", "too many large bodies come at once; try again", retry_after=AGAIN_SECONDS
                )
            self.held += more
            held += more

        def release() -> None:
            nonlocal held, is_answered
            self.held -= held
            held, is_answered = 0, True

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":  # the answer itself may take minutes
                release()
            await send(message)

        try:
            await self.app(scope, self._bounded(receive, hold), sending)
        finally:
            release()

    def _bounded(self, receive: Receive, hold: Callable[[int], None]) -> Receive:
        """What receives the body of a request, within its bounds.

        Args:
            hold: Makes room for the bytes of the body that have come.
        """
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
            hold(came)
            return message

        return receiving
