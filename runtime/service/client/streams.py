"""A live stream as a client receives it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from wanforge.errors import RequestError
from wanforge.runtime.service.client.connection import TERMINAL, Connection, path_of, refusal, unreachable

STREAMS = "/v1/streams"
WAITING = httpx2.Timeout(None, connect=10.0)
"""A stream may wait for a worker, or be paused, for as long as the server allows."""
LOOKS, LOOK_SECONDS = 20, 0.5
"""How often it is looked why a stream has broken off."""


@dataclass(frozen=True)
class Incoming:
    """A stream that comes in.

    Attributes:
        video_id: Id of its video.
        pieces: The bytes of the video.
    """

    connection: Connection
    video_id: str
    pieces: Iterator[bytes]

    def steer(self, **wish: Any) -> None:
        """Change what it shows: ``prompt``, ``cut``, ``paused`` or ``stop``.

        Raises:
            ServerError: The server refuses it.
            ResourceError: The server cannot be reached.
        """
        try:
            answer = self.connection.http.post(path_of(STREAMS, self.video_id), json=wish)
        except httpx2.RequestError:
            raise unreachable(self.connection.url) from None
        if answer.status_code >= 400:
            raise refusal(answer)

    def why_broken(self) -> RequestError:
        """The error for a stream that has broken off, as its video tells a moment later."""
        for _ in range(LOOKS):
            video = self.connection.video(self.video_id)
            if video["status"] in TERMINAL:
                error = video.get("error")
                said = f"{error['message']} ({error['code']})" if error else f"its video is {video['status']}"
                return RequestError(f"the stream {self.video_id} has broken off: {said}")
            self.connection.pause(LOOK_SECONDS)
        return RequestError(
            f"the stream {self.video_id} has broken off; wanforge client status {self.video_id} says more"
        )


@contextmanager
def incoming(connection: Connection, fields: Mapping[str, Any]) -> Iterator[Incoming]:
    """Start a stream, which ends with the block.

    Raises:
        ServerError: The server refuses it.
        RequestError: It has broken off.
        ResourceError: The server cannot be reached.
    """
    wanted = {name: value for name, value in fields.items() if value is not None}
    has_begun = None
    try:
        with connection.http.stream(
            "POST",
            STREAMS,
            content=json.dumps(wanted),
            headers={"Content-Type": "application/json"},
            timeout=WAITING,
        ) as response:
            if response.status_code >= 400:
                response.read()
                raise refusal(response)
            has_begun = Incoming(connection, response.headers["video-id"], response.iter_raw())
            yield has_begun
    except httpx2.RequestError:
        raise (unreachable(connection.url) if has_begun is None else has_begun.why_broken()) from None
