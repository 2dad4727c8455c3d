"""What a live stream shows, as whoever watches it says."""

from collections.abc import Iterator
from dataclasses import replace
from threading import Condition

from wanforge.runtime.causal.stream import Scene


class StreamEndedError(Exception):
    """Nobody wants the rest of a stream."""


class Direction:
    """The scenes of a live stream: each chunk shows what was said last before it was begun. One thread iterates it, and
    others may call the rest.

    Args:
        scene: What it shows at first.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._changed = Condition()
        self._is_paused = self._has_ended = False

    @property
    def prompt(self) -> str:
        """What was said last."""
        with self._changed:
            return self._scene.prompt

    def show(self, scene: Scene) -> None:
        """Show something from the next chunk on. A cut that no chunk has begun with yet is not forgotten."""
        with self._changed:
            self._scene = replace(scene, is_cut=scene.is_cut or self._scene.is_cut)

    def pause(self) -> None:
        """Begin no chunk until `resume` is called."""
        with self._changed:
            self._is_paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._changed:
            self._is_paused = False
            self._changed.notify_all()

    def end(self) -> None:
        """Begin no other chunk, and give up the one that is being made."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def alive(self) -> None:
        """Go on unless the stream is to end.

        Raises:
            StreamEndedError: It is.
        """
        if self._has_ended:
            raise StreamEndedError

    def __iter__(self) -> Iterator[Scene]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_ended or not self._is_paused)
                if self._has_ended:
                    return
                scene, self._scene = self._scene, replace(self._scene, is_cut=False)
            yield scene
