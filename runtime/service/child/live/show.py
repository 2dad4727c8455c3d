"""A live stream while it is watched."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event, Thread

import torch

from wanforge.errors import WanforgeError
from wanforge.runtime.causal.stream import Streamed
from wanforge.runtime.service.child.live.carrier import Carrier
from wanforge.runtime.service.child.live.samples import Samples
from wanforge.runtime.service.live.terms import LIVE, LiveTerms
from wanforge.runtime.service.live.wire import (
    ChunkShown,
    EndReason,
    Link,
    NobodyWatchesError,
    StreamEnded,
    VideoPiece,
    Wish,
)
from wanforge.runtime.streaming.fragments import ReaderGoneError, fragments
from wanforge.runtime.streaming.live import Live

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
AHEAD_SECONDS = 1.0
"""How much further than its watcher a paced stream may be, apart from the chunks that are being made."""
MEGABYTE = 1_000_000


class Show:
    """Sends a stream to whoever watches it, keeps it in a file, and lets it be steered.

    Four threads besides those of `Live` take part: one takes the chunks to the encoder (`_play`), the carrier takes the
    video from there, one hears wishes, and the one that calls `run` sees that the limits are kept.

    Args:
        made: The stream, which is closed at the end.
        link: To the server, which is closed, too.
        file: What the video is kept in, a fragmented mp4.
    """

    def __init__(self, made: Live, terms: LiveTerms, link: Link, file: Path) -> None:
        self.made, self.terms, self.link, self.file = made, terms, link, file
        self.samples, self.chunks = Samples(), 0
        self.reason: EndReason = "length"
        self._ends = Event()
        self._carrier = Carrier(file, lambda data: link.send(VideoPiece(data)))
        self._moved_at = self._told_at = self._begun_at = self._paced_from = time.monotonic()
        self._is_pacing = False
        self._paused_at: float | None = None
        made.progress = self._note

    def run(self, report: Callable[[str, int], object]) -> None:
        """Show the stream until it ends.

        Args:
            report: Called again and again, unless the stream hangs. It may raise an exception, which ends the stream at
                once.

        Raises:
            NobodyWatchesError: Nobody watches it, and nothing of it is there.
            VideoError, ResourceError: The encoder failed.
            OSError: The file cannot be written.
        """
        hearing = Thread(target=self._hear, name="wishes", daemon=True)
        hearing.start()
        try:
            with ThreadPoolExecutor(1, "show") as pool:
                playing = pool.submit(self._play)
                try:
                    while wait([playing], LOOK_SECONDS).not_done:
                        self._look(report)
                except BaseException:
                    self._end("stopped", at_once=True)
                    self.link.hang_up()
                    raise
            playing.result()
            self._ends.set()  # whatever is heard from here on is not why it ended
            with suppress(OSError):  # nobody is there
                self.link.send(StreamEnded(self.reason))
        finally:
            self.made.close()
            self.link.hang_up()
            hearing.join()
            self.link.close()

    def _look(self, report: Callable[[str, int], object]) -> None:
        """Tell that all is well, if it is, and end a stream that has reached its limits."""
        now, paused_at = time.monotonic(), self._paused_at
        waits = self._carrier.is_sending or self._is_pacing or paused_at is not None
        if waits or self._moved_at >= self._told_at:
            self._told_at = now
            report(LIVE, 0)
        if paused_at is not None and now - paused_at > self.terms.pause_seconds:
            self._end("paused")
        is_long = self.chunks and now - self._begun_at > self.terms.seconds
        if is_long or self._carrier.count > self.terms.megabytes * MEGABYTE:
            self._end("limit")

    def _note(self, stage: str, done: int, total: int, unit: str = "", /) -> None:
        self._moved_at = time.monotonic()

    def _play(self) -> None:
        """Take one chunk after the other to the encoder."""
        stream, model = self.made.stream, self.made.pipeline.model
        size = stream.shape.width_px, stream.shape.height_px
        try:
            with ExitStack() as stack:
                first = next(self.made, None)
                if first is None:
                    raise NobodyWatchesError("nobody watches this stream any more")
                self._begun_at = self._paced_from = time.monotonic()
                stack.enter_context(self._carrier)
                name, writes = "the stream", self._carrier.writes
                write = stack.enter_context(fragments(name, writes, size, model.video.fps, stream.causal))
                chunk: Streamed | None = first
                while chunk is not None:
                    self._show(chunk, write)
                    self._pace()
                    chunk = None if self._ends.is_set() else next(self.made, None)
        except ReaderGoneError:
            if self._carrier.error is None:
                raise
        if self._carrier.error is not None:
            raise self._carrier.error

    def _show(self, chunk: Streamed, write: Callable[[torch.Tensor], object]) -> None:
        for each in chunk.frames:
            frame = torch.from_numpy(each)
            write(frame)
            self.samples(frame)
        self.chunks += 1
        with suppress(OSError):
            self.link.send(ChunkShown(self.chunks, self.samples.count, chunk.prompt))

    def _pace(self) -> None:
        """Wait as long as the stream is ahead of its watcher."""
        if not self.terms.is_paced:
            return
        shown = self.samples.count / self.made.pipeline.model.video.fps
        self._is_pacing = True
        self._ends.wait(max(0.0, self._paced_from + shown - AHEAD_SECONDS - time.monotonic()))
        self._is_pacing = False

    def _hear(self) -> None:
        """Do what the watcher wishes, until it has gone."""
        try:
            while True:
                self._obey(self.link.receive())
        except (EOFError, OSError):
            self._end("reader", at_once=True)
        except Exception:
            log.exception("A wish could not be understood.")
            self._end("reader", at_once=True)

    def _obey(self, wish: Wish) -> None:
        try:
            if wish.is_cut:
                self.made.cut(self.made.prompt if wish.prompt is None else wish.prompt)
            elif wish.prompt is not None:
                self.made.prompt = wish.prompt
        except WanforgeError as error:  # the server has checked it before
            log.error("A prompt was refused: %s", error)
        if wish.is_paused is not None:
            self._pause(is_paused=wish.is_paused)
        if wish.ends:
            self._end("stopped")

    def _pause(self, *, is_paused: bool) -> None:
        if self._ends.is_set() or is_paused == (self._paused_at is not None):
            return
        if is_paused:
            self.made.pause()
            self._paused_at = time.monotonic()
        else:
            self._paced_from += time.monotonic() - (self._paused_at or 0.0)
            self._paused_at = None
            self.made.resume()

    def _end(self, reason: EndReason, *, at_once: bool = False) -> None:
        """Let the stream end.

        Args:
            at_once: Whether it may end before anything of it is there.
        """
        if not self._ends.is_set():
            self.reason = reason
            self._ends.set()
        self._paused_at = None
        if self.chunks or at_once:
            self.made.end()
        else:
            self.made.resume()
