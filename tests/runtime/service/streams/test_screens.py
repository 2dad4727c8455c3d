"""The connection between server and child: nothing piles up in it, and it ends with either side."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.leaks import open_files
from wanforge.runtime.service.live.wire import (
    NAME,
    ChunkShown,
    Link,
    StreamEnded,
    VideoPiece,
    Wish,
)
from wanforge.runtime.service.web.streams.screens import BrokenOffError, Screen, Screens

SECONDS = 20.0


def in_child(act: Callable[[Link], object], folder: Path, screen: str) -> threading.Thread:
    """Let a thread do what a child does."""

    def work() -> None:
        link = Link(folder, screen)
        try:
            act(link)
        finally:
            link.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


async def opened(screens: Screens) -> Screen:
    """A screen that waits for a child."""
    await screens.listen()
    return screens.open("a kite", "ann")


async def arrived(screens: Screens, act: Callable[[Link], object]) -> tuple[Screen, threading.Thread]:
    """A screen to which a child has come."""
    screen = await opened(screens)
    thread = in_child(act, screens.folder, screen.name)
    assert await screen.arrived(SECONDS)
    return screen, thread


async def joined(thread: threading.Thread) -> None:
    await asyncio.to_thread(thread.join, SECONDS)
    assert not thread.is_alive()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose path is longer than the address of a socket may be."""
    found = tmp_path / ("long" * 40)
    found.mkdir()
    return found


def test_bytes_come_in_order_and_the_end_is_told(folder: Path) -> None:
    def show(link: Link) -> None:
        for place in range(100):
            link.send(VideoPiece(bytes([place])))
        link.send(ChunkShown(3, 17, "a kite"))
        link.send(StreamEnded("length"))

    async def run() -> None:
        screens = Screens(folder)
        screen, thread = await arrived(screens, show)
        assert b"".join([piece async for piece in screen.pieces()]) == bytes(range(100))
        assert screen.ended == StreamEnded("length")
        assert screen.shown == ChunkShown(3, 17, "a kite")
        await joined(thread)
        screens.forget(screen)
        await screens.close()
        assert screens.count == 0

    asyncio.run(run())
    assert list(folder.iterdir()) == []


def test_a_child_that_ends_halfway_breaks_the_stream_off(folder: Path) -> None:
    async def run() -> None:
        screens = Screens(folder)
        screen, thread = await arrived(screens, lambda link: link.send(VideoPiece(b"some")))
        with pytest.raises(BrokenOffError):
            assert [piece async for piece in screen.pieces()] == [b"some"]
        await joined(thread)
        await screens.close()

    asyncio.run(run())


def test_a_reader_that_reads_nothing_holds_the_child_back_and_its_end_frees_it(folder: Path) -> None:
    sent = 0

    def show(link: Link) -> None:
        nonlocal sent
        with suppress(OSError):
            while True:
                link.send(VideoPiece(bytes(10_000)))
                sent += 10_000

    async def run() -> None:
        screens = Screens(folder)
        screen, thread = await arrived(screens, show)
        while not sent:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert sent < 1_000_000
        assert thread.is_alive()
        screens.forget(screen)
        await joined(thread)
        await screens.close()

    asyncio.run(run())


def test_ten_thousand_wishes_take_the_room_of_one(folder: Path) -> None:
    heard: list[Wish] = []
    may_hear = threading.Event()

    def show(link: Link) -> None:
        may_hear.wait(SECONDS)
        while not heard or not heard[-1].ends:
            heard.append(link.receive())

    async def run() -> None:
        screens = Screens(folder)
        screen, thread = await arrived(screens, show)
        for number in range(10_000):
            screen.wish(Wish(prompt=f"{number} " + "kite " * 1000, is_cut=number == 5000))
            if number % 100 == 0:
                await asyncio.sleep(0)
        screen.wish(Wish(ends=True))
        may_hear.set()
        await joined(thread)
        screens.forget(screen)
        await screens.close()

    asyncio.run(run())
    assert len(heard) < 1000
    prompts = [wish.prompt for wish in heard if wish.prompt is not None]
    assert prompts[-1].startswith("9999 ")
    assert sum(wish.is_cut for wish in heard) == 1


def test_wishes_before_the_stream_has_begun_are_kept(folder: Path) -> None:
    heard: list[Wish] = []

    async def run() -> None:
        screens = Screens(folder)
        screen = await opened(screens)
        screen.wish(Wish(prompt="a train"))
        screen.wish(Wish(is_paused=True))
        thread = in_child(lambda link: heard.append(link.receive()), folder, screen.name)
        await joined(thread)
        assert (screen.prompt, screen.is_paused) == ("a train", True)
        screens.forget(screen)
        await screens.close()

    asyncio.run(run())
    assert heard == [Wish(prompt="a train", is_paused=True)]


def test_whoever_names_no_screen_is_sent_away(folder: Path) -> None:
    async def run() -> None:
        screens = Screens(folder)
        screen = await opened(screens)

        def show(link: Link) -> None:
            with pytest.raises((EOFError, OSError)):
                link.receive()

        for name in ("another", screen.name[:-1]):
            await joined(in_child(show, folder, name))
        await joined(in_child(lambda link: None, folder, screen.name))
        await joined(in_child(show, folder, screen.name))  # which a child has had before
        screens.forget(screen)
        await joined(in_child(show, folder, screen.name))
        await screens.close()

    asyncio.run(run())


def test_a_socket_that_a_killed_server_left_is_in_nobodys_way(folder: Path) -> None:
    (folder / NAME).write_bytes(b"")
    with pytest.raises(OSError):
        Link(folder, "any")

    async def run() -> None:
        screens = Screens(folder)
        screen, thread = await arrived(screens, lambda link: None)
        await joined(thread)
        screens.forget(screen)
        await screens.close()

    asyncio.run(run())
    with pytest.raises(OSError):
        Link(folder, "any")


def test_those_who_come_at_once_open_one_socket(folder: Path) -> None:
    async def run() -> None:
        screens = Screens(folder)
        before = open_files()
        await asyncio.gather(*(screens.listen() for _ in range(5)))
        assert len(open_files() - before) == 1
        await screens.close()

    asyncio.run(run())


def test_who_waits_when_the_server_ends_is_not_let_wait(folder: Path) -> None:
    heard: list[Wish] = []

    async def run() -> None:
        screens = Screens(folder)
        waiting = await opened(screens)
        screen, thread = await arrived(screens, lambda link: heard.append(link.receive()))
        screens.end()
        assert not await waiting.arrived(SECONDS)
        assert waiting.is_over
        assert not screen.is_over
        await joined(thread)
        await screens.close()

    asyncio.run(run())
    assert heard == [Wish(ends=True)]


def test_wishes_become_one() -> None:
    first = Wish(prompt="a", is_cut=True)
    assert first.then(Wish(prompt="b")) == Wish(prompt="b", is_cut=True)
    assert first.then(Wish(is_paused=True)).then(Wish(is_paused=False)) == Wish(
        prompt="a", is_cut=True, is_paused=False
    )
    assert Wish(ends=True).then(Wish(prompt="a")).ends
