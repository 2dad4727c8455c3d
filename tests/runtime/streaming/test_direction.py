"""A chunk shows what was said last before it was begun."""

from itertools import islice
from threading import Thread

import pytest

from wanforge.runtime.causal.stream import Scene
from wanforge.runtime.streaming.direction import Direction, StreamEndedError

KITE, TRAIN, CAT = (Scene(name, (number,)) for number, name in enumerate(("kite", "train", "cat")))
CUT = Scene("cut", (9,), is_cut=True)


def test_what_was_said_last_holds() -> None:
    direction = Direction(KITE)
    scenes = iter(direction)
    assert list(islice(scenes, 2)) == [KITE, KITE]
    direction.show(TRAIN)
    direction.show(CAT)
    assert direction.prompt == "cat"
    assert list(islice(scenes, 2)) == [CAT, CAT]


def test_a_cut_is_made_once_and_not_forgotten() -> None:
    direction = Direction(KITE)
    scenes = iter(direction)
    direction.show(CUT)
    direction.show(CAT)
    assert [(scene.prompt, scene.is_cut) for scene in islice(scenes, 2)] == [("cat", True), ("cat", False)]


def test_an_end_comes_in_a_pause_too() -> None:
    direction = Direction(KITE)
    direction.alive()
    direction.pause()
    found: list[Scene] = []
    thread = Thread(target=lambda: found.extend(direction))
    thread.start()
    direction.end()
    thread.join(60)
    assert not thread.is_alive()
    assert found == []
    with pytest.raises(StreamEndedError):
        direction.alive()
