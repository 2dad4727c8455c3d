"""What becomes of a command whose output nobody reads to the end: it goes on, because its files are still wanted."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO, cast


class Outlet(io.FileIO):
    """A standard stream that writes to nowhere once its reader has gone, as `head` goes after ten lines.

    Args:
        is_needed: Whether other errors, such as a full disk, are raised. They are raised once; afterwards the stream
            writes to nowhere, too.
    """

    def __init__(self, descriptor: int, *, is_needed: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.is_needed = is_needed

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if self.is_needed and not isinstance(error, BrokenPipeError):
                error.filename = "the standard output"
                raise
            return len(data)


@contextmanager
def patient_streams() -> Iterator[None]:
    """Let the standard streams be outlets while the block runs. Streams that were closed from the start lead to
    nowhere, because otherwise the next file that is opened would take their place."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
    before = sys.stdout, sys.stderr
    sys.stdout = outlet(before[0] or os.fdopen(1, "w", closefd=False), is_needed=True)
    sys.stderr = outlet(before[1] or os.fdopen(2, "w", closefd=False), is_needed=False)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def outlet(stream: TextIO, *, is_needed: bool) -> TextIO:
    """The same stream as an outlet; unchanged if it is no file, as in tests and notebooks."""
    try:
        stream.flush()
        raw = Outlet(stream.fileno(), is_needed=is_needed)
    except (OSError, ValueError):
        return stream
    buffered = io.BufferedWriter(cast(io.RawIOBase, raw))
    # A stream that Python was told not to buffer writes every line at once.
    by_line = bool(stream.line_buffering or getattr(stream, "write_through", False))
    return io.TextIOWrapper(buffered, stream.encoding, stream.errors, line_buffering=by_line)
