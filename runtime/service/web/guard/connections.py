"""A connection that does not wait for its client for ever."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""How long the head of a request may take, from the connection or its first byte on."""
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
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._asking, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE or self._is_answered:
            self._expect_head()
        elif self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE and self._is_answered:
            self._expect_head()

    @property
    def _is_answered(self) -> bool:
        """Whether the last request has its answer, though its body may not be there yet."""
        return self.cycle is not None and self.cycle.response_complete

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        super().resume_writing()

    def _expect_head(self) -> None:
        """Cut the connection off if the head of the next request is not there in time."""
        if self._asking is None:
            self._asking = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
