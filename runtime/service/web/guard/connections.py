"""A connection that does not wait for its client for ever."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
"""How long the head of a request may take, from the connection or its first byte on."""
HEAD_BYTES = 64 * 1024
"""How long the head of a request may be, and what follows its body, about."""
STALLED_SECONDS = 60.0
"""How long a client may take to read what the server holds ready for it, which is at most 64 KiB."""


class TimedConnection(HttpToolsProtocol):
    """An HTTP connection that is cut off if its client is slow to ask or to read, or has too much to ask.

    Without it, a client that sends a byte now and then keeps its place for ever, because uvicorn only ends connections
    on which nothing happens at all, and the head of a request may grow until the memory is full. `Bounded` sees to the
    bodies of requests.
    """

    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _head_bytes = 0
    """Bytes since a request, its head, or the last piece of its body began."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._asking, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request, or what follows its body, is too long.")
            return
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        elif self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """Take up a request whose head is there.

        Raises:
            ValueError: It came at once and is too long, which is answered with status 400.
        """
        self._head_bytes = 0
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            raise ValueError("the head of the request is too long")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._head_bytes = 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:  # the rest of a body that nobody reads
            self._expect_head()

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
