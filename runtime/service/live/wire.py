"""The connection between the server, which a client watches a live stream through, and the child that makes it.

It is a Unix socket in the folder of the service, so the connection ends with either process, however that ends. The
bytes of the video go one way and wishes the other. A message is MessagePack behind its length, four bytes in network
order, which is how `multiprocessing.connection` writes it, too.
"""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Literal

import msgspec

from wanforge.configs.loading import Record
from wanforge.errors import RequestError

NAME = "live.sock"
HELD_BYTES = 1 << 16
"""About how many bytes of a video lie in the connection while nobody reads them. A few frames, so that a slow client
holds the denoiser back soon."""
PIECE_BYTES = 1 << 14
"""The most bytes of a video that one message carries."""
LENGTH = struct.Struct("!i")

EndReason = Literal["length", "stopped", "limit", "paused", "reader"]
"""Why a stream ended: all of its chunks are made; a client stopped it; it lasted as long, or became as large, as it
may; it was paused for too long; nobody watches it any more."""


class NobodyWatchesError(RequestError):
    """Whoever wanted to watch a stream has gone before there was anything to see."""


class Hello(Record, frozen=True, tag=True):
    """The first message of a child: which screen its stream is for."""

    screen: str


class VideoPiece(Record, frozen=True, tag=True):
    """The next bytes of the video."""

    data: bytes


class ChunkShown(Record, frozen=True, tag=True):
    """A chunk has been handed to the encoder, and which frames and what prompt it has."""

    chunks: int
    frames: int
    prompt: str


class StreamEnded(Record, frozen=True, tag=True):
    """All bytes of the video have been sent. A connection that ends without this broke off."""

    reason: EndReason


class Wish(Record, frozen=True, kw_only=True):
    """What a client wants to change.

    Attributes:
        prompt: What the next chunks show; None for what is shown now.
        is_cut: Whether a new scene begins.
        is_paused: Whether no further chunk is begun; None to leave it as it is.
        ends: Whether the stream is to end, in good order.
    """

    prompt: str | None = None
    is_cut: bool = False
    is_paused: bool | None = None
    ends: bool = False

    def then(self, later: "Wish") -> "Wish":
        """This wish and a later one as one: the later prompt counts, and no cut is forgotten."""
        return Wish(
            prompt=self.prompt if later.prompt is None else later.prompt,
            is_cut=self.is_cut or later.is_cut,
            is_paused=self.is_paused if later.is_paused is None else later.is_paused,
            ends=self.ends or later.ends,
        )


NOTHING = Wish()
ToServer = Hello | VideoPiece | ChunkShown | StreamEnded
FROM_CHILD = msgspec.msgpack.Decoder(ToServer)


def framed(message: ToServer | Wish) -> bytes:
    """A message as it is sent."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def listening(folder: Path) -> socket.socket:
    """A socket that listens in a folder, in place of one that an earlier process has left there.

    Raises:
        OSError: It cannot be made.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short(folder) as place:
            (folder / NAME).unlink(missing_ok=True)
            made.bind(place)
        (folder / NAME).chmod(0o600)
        made.listen()
    except OSError:
        made.close()
        raise
    return made


@contextmanager
def short(folder: Path) -> Iterator[str]:
    """The path of the socket in a folder, as long as the ``with`` block runs, in fewer than the 108 bytes that the
    address of a socket may have."""
    held = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{held}/{NAME}"
    finally:
        os.close(held)


class Link:
    """A child's end of the connection. Several threads may send; one receives.

    Raises:
        OSError: Nobody listens in the folder.
    """

    def __init__(self, folder: Path, screen: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, HELD_BYTES)
        self._sending = Lock()
        self._reads = self._socket.makefile("rb")
        try:
            with short(folder) as place:
                self._socket.connect(place)
            self.send(Hello(screen))
        except OSError:
            self.close()
            raise

    def send(self, message: ToServer) -> None:
        """Send a message, and wait as long as the server takes nothing.

        Raises:
            OSError: The server has ended the connection.
        """
        with self._sending:
            self._socket.sendall(framed(message))

    def receive(self) -> Wish:
        """Wait for a wish.

        Raises:
            EOFError, OSError: The server has ended the connection.
        """
        head = self._reads.read(LENGTH.size)
        body = self._reads.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""
        if not body:
            raise EOFError
        return msgspec.msgpack.decode(body, type=Wish)

    def hang_up(self) -> None:
        """End the connection; threads that send or receive get an error."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side has done so already
            return

    def close(self) -> None:
        """Give its descriptors back, once no thread uses them."""
        self._reads.close()
        self._socket.close()
