"""A client of a live stream that is interrupted."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wanforge.interrupts import Interrupted
from wanforge.runtime.service.client.connection import ServerError
from wanforge.runtime.service.commands import watching


class Coming:
    """A stream of two pieces that has ended by itself, and refuses to be steered.

    Attributes:
        pieces: Its bytes; a signal comes after the first of them.
    """

    def __init__(self, code: str) -> None:
        self.code, self.left = code, [b"one ", b"two"]
        self.pieces = self

    def __enter__(self) -> "Coming":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[bytes]:
        while self.left:
            yield self.left.pop(0)
            if len(self.left) == 1:
                raise Interrupted(signal.SIGINT)

    def steer(self, **wish: Any) -> None:
        raise ServerError("the server says no", self.code, 409)


def test_a_stream_that_ends_while_it_is_interrupted_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "Ahead", lambda pieces, name: pieces)
    coming: Any = Coming("not_live")
    assert watching.written(coming, tmp_path / "kite.mp4") == len(b"one two")
    assert (tmp_path / "kite.mp4").read_bytes() == b"one two"
    coming = Coming("invalid_api_key")
    with pytest.raises(ServerError, match="says no"):
        watching.written(coming, tmp_path / "kite.mp4")
