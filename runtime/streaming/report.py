"""What a stream tells while it is made: lines of JSON, or for people a log and a last line."""

import json
import logging
import time
from pathlib import Path
from typing import Any, Literal

import click

from wanforge.runtime.progress import Bars

log = logging.getLogger(__name__)

Reason = Literal["length", "signal", "reader"]
"""Why a stream ended: all of its chunks are made; a signal asked for it; nobody reads it any more."""

ENDED = {"length": "all chunks are made", "signal": "stopped", "reader": "its reader has gone"}


class StreamReport:
    """Tells of one stream, from several threads.

    Args:
        out: Where the video goes; ``-`` is the standard output, and then the report goes to stderr.
        chunks: The number of chunks at which it ends, if it does.
    """

    def __init__(self, out: Path, chunks: int | None, fps: int, bars: Bars, *, as_json: bool) -> None:
        self.out, self.limit, self.fps, self.bars, self.as_json = out, chunks, fps, bars, as_json
        self.chunks = self.frames = 0
        self._begun = time.monotonic()

    def begin(self, **fields: Any) -> None:
        """Tell what is about to be made."""
        self._tell("begin", out=str(self.out), fps=self.fps, chunks=self.limit, **fields)

    def chunk(self, frames: int, prompt: str) -> None:
        """Tell that a chunk has been handed to the encoder."""
        self._tell("chunk", index=self.chunks, frames=frames, prompt=prompt, seconds=self._seconds())
        self.chunks, self.frames = self.chunks + 1, self.frames + frames
        log.info("chunk %d after %.2f s: %s", self.chunks, self._seconds(), prompt)
        if self.limit is not None and not self.as_json:  # whose lines may go to stderr, like those of the bar
            self.bars("chunk", self.chunks, self.limit)

    def prompt(self, prompt: str, *, is_cut: bool) -> None:
        """Tell that the next chunk shows something else."""
        self._tell("prompt", prompt=prompt, is_cut=is_cut)
        log.info("from the next chunk on%s: %s", ", in a new scene" if is_cut else "", prompt)

    def refused(self, line: str, reason: str) -> None:
        """Tell that a line changes nothing."""
        self._tell("refused", line=line, error=reason)
        if not self.as_json:
            log.warning("%s; the video goes on as before", reason)

    def end(self, reason: Reason) -> None:
        """Tell that the video is complete."""
        self.bars.close()
        seconds = self._seconds()
        self._tell("end", reason=reason, chunks=self.chunks, frames=self.frames, seconds=seconds)
        if not self.as_json and reason != "reader":
            self._say(
                f"{self.out}: {self.chunks} chunks, {self.frames} frames, {self.frames / self.fps:.1f} s of video in "
                f"{seconds:.1f} s; {ENDED[reason]}"
            )

    def _seconds(self) -> float:
        return round(time.monotonic() - self._begun, 3)

    def _tell(self, event: str, **fields: Any) -> None:
        if self.as_json:
            self._say(json.dumps({"event": event, **fields}))

    def _say(self, line: str) -> None:
        click.echo(f"{line}\n", nl=False, err=str(self.out) == "-")  # in one piece, because several threads write
