"""Where live streams arrive: each on a screen, which one client watches."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import msgspec

from wanforge.runtime.service.live.wire import (
    FROM_CHILD,
    HELD_BYTES,
    LENGTH,
    NAME,
    NOTHING,
    ChunkShown,
    Hello,
    StreamEnded,
    ToServer,
    VideoPiece,
    Wish,
    framed,
    listening,
)

log = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
"""How long a child may take to say which stream it brings."""
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class BrokenOffError(Exception):
    """The child of a stream, or its connection, has ended before the stream did."""


class Screen:
    """Shows one stream to one client. Everything happens in the event loop.

    Args:
        owner: Whose stream it is.

    Attributes:
        name: What the child asks for.
        prompt: What the client wished to see last.
        is_paused: Whether it wished a pause.
        shown: What the child said of the chunk that was shown last.
        ended: How the stream ended, once it has.
    """

    def __init__(self, prompt: str, owner: str) -> None:
        self.owner, self.name, self.prompt, self.is_paused = owner, secrets.token_hex(16), prompt, False
        self.shown = ChunkShown(0, 0, "")
        self.ended: StreamEnded | None = None
        self._connection: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._wish, self._wished = NOTHING, asyncio.Event()
        self._telling: asyncio.Task[None] | None = None

    @property
    def is_connected(self) -> bool:
        """Whether the stream has arrived."""
        return self._connection.done() and not self._connection.cancelled()

    @property
    def is_over(self) -> bool:
        """Whether nobody watches any more."""
        return self._connection.cancelled() or self.ended is not None

    def connect(self, connection: Connection) -> bool:
        """Take the connection of a child; False if there is one already, or if nobody watches any more."""
        if self._connection.done():
            return False
        self._connection.set_result(connection)
        self._telling = asyncio.create_task(self._tell(connection[1]))
        return True

    async def arrived(self, seconds: float) -> bool:
        """Wait for the stream. Returns whether it has arrived."""
        await asyncio.wait([self._connection], timeout=seconds)
        return self.is_connected

    async def pieces(self) -> AsyncIterator[bytes]:
        """The bytes of the video. If they are not asked for, the child waits.

        Raises:
            BrokenOffError: The stream has broken off.
        """
        reader, _ = self._connection.result()
        while self.ended is None:
            try:
                message = await received(reader)
            except (OSError, EOFError, msgspec.DecodeError) as error:
                raise BrokenOffError from error
            match message:
                case VideoPiece(data):
                    yield data
                case ChunkShown():
                    self.shown = message
                case StreamEnded():
                    self.ended = message

    def wish(self, wish: Wish) -> None:
        """Tell the child what the client wants. Wishes that it has not taken yet become one with it, so that they take
        no room."""
        self.prompt = self.prompt if wish.prompt is None else wish.prompt
        self.is_paused = self.is_paused if wish.is_paused is None else wish.is_paused
        self._wish = self._wish.then(wish)
        self._wished.set()

    def close(self) -> None:
        """Let nobody watch any more, by which the child ends the stream."""
        if self._telling is not None:
            self._telling.cancel()
        if self.is_connected:
            self._connection.result()[1].close()
        else:
            self._connection.cancel()

    async def _tell(self, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # which `pieces` notices, too
            while await self._wished.wait():
                self._wished.clear()
                wish, self._wish = self._wish, NOTHING
                writer.write(framed(wish))
                await writer.drain()


class Screens:
    """All screens of a server, and the socket that children connect to, which is opened before the first screen.

    Args:
        folder: The folder of the service.

    Attributes:
        is_ending: Whether the server ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._expected: dict[str, Screen] = {}
        self._by_job: dict[str, Screen] = {}
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()
        self.is_ending = False

    @property
    def count(self) -> int:
        """How many clients watch, or wait."""
        return len(self._expected)

    def count_of(self, owner: str) -> int:
        """How many of them are one owner's."""
        return sum(screen.owner == owner for screen in self._expected.values())

    async def listen(self) -> None:
        """Open the socket, unless it is open.

        Raises:
            OSError: The folder can have no socket.
        """
        async with self._opening:
            if self._server is None:
                self._server = await asyncio.start_unix_server(
                    self._welcome, sock=listening(self.folder), limit=HELD_BYTES // 2
                )

    def open(self, prompt: str, owner: str) -> Screen:
        """A new screen, once the socket is open."""
        screen = Screen(prompt, owner)
        self._expected[screen.name] = screen
        return screen

    def assign(self, job: str, screen: Screen) -> None:
        """Let a screen be found by its job."""
        self._by_job[job] = screen

    def of(self, job: str) -> Screen | None:
        """The screen of a job that somebody watches."""
        return self._by_job.get(job)

    def forget(self, screen: Screen, job: str | None = None) -> None:
        """Forget a screen, which nobody watches any more."""
        screen.close()
        self._expected.pop(screen.name, None)
        if job is not None:
            self._by_job.pop(job, None)

    def end(self) -> None:
        """Let all streams end in good order, because the server does; those that wait for a worker end at once."""
        self.is_ending = True
        for screen in self._expected.values():
            if screen.is_connected:
                screen.wish(Wish(ends=True))
            else:
                screen.close()

    async def close(self) -> None:
        """Take no more streams."""
        if self._server is not None:
            self._server.close()
            for screen in self._expected.values():
                screen.close()
            (self.folder / NAME).unlink(missing_ok=True)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bring a child's connection to its screen, or end it."""
        with suppress(OSError, EOFError, TimeoutError, msgspec.DecodeError):
            hello = await asyncio.wait_for(received(reader), HELLO_SECONDS)
            screen = self._expected.get(hello.screen) if isinstance(hello, Hello) else None
            if screen is not None and screen.connect((reader, writer)):
                return
        writer.close()


async def received(reader: asyncio.StreamReader) -> ToServer:
    """The next message of a child.

    Raises:
        EOFError, OSError: The connection has ended.
        msgspec.DecodeError: It is no message.
    """
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return FROM_CHILD.decode(await reader.readexactly(length))
