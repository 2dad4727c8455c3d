"""A connection that does not wait for its client for ever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""How long the head of a request may take, from the connection or the end of the answer before."""
STALLED_SECONDS = 60.0
"""How long a client may take to read what the server holds ready for it, which is at most 64 KiB."""


class TimedConnection(H11Protocol):
    """An HTTP connection that is cut off if its client is slow to ask or to read.

    Without it, a client that sends a byte now and then keeps its place for ever, because uvicorn only ends connections
    on which nothing happens at all. `Bounded` sees to clients that are slow to send the body of a request.
    """

    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._asking, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        if self.cycle is answered:  # a client may have sent its next request already
            self._expect_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        super().resume_writing()

    def _expect_request(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        self._asking = self.loop.call_later(HEAD_SECONDS, self._end_unless_asked, self.cycle)

    def _end_unless_asked(self, before: Any) -> None:
        """End the connection if no request has come after one."""
        if self.cycle is before:
            self.transport.abort()
