"""Frames on their way to the encoder, which a thread feeds while the next frames are being decoded."""

from collections.abc import Callable
from queue import Queue
from threading import Thread

from torch import Tensor

MOST_WAITING = 8
"""The most frames that wait for the encoder: those of two chunks of the VAE."""


class FrameQueue:
    """Writes frames in a thread, in the order in which they come. Once `MOST_WAITING` frames wait, so does the caller.

    Args:
        write: Takes the bytes of a frame. If it fails, the caller gets its error with the next frame or at the end.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._frames: Queue[Tensor | None] = Queue(MOST_WAITING)
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, name="encoder", daemon=True)
        self._thread.start()

    def put(self, frame: Tensor) -> None:
        """Add a frame, which must not be changed any more."""
        if self._error is not None:
            raise self._error
        self._frames.put(frame)

    def finish(self) -> None:
        """Wait until all frames are written."""
        self.abandon()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """End the thread, whatever became of the frames. Where the encoder may hang, it has to be killed first."""
        self._frames.put(None)
        self._thread.join()

    def _run(self) -> None:
        for frame in iter(self._frames.get, None):
            if self._error is None:  # after an error, frames are only taken so that nobody waits for room
                try:
                    self._write(frame.numpy().tobytes())
                except Exception as error:
                    self._error = error
