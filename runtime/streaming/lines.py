"""Lines that somebody types, or that a program writes, while the process does something else."""

import os
import select
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Self

LONGEST = 1 << 16
"""The most bytes that are kept of a line that does not end."""


class TypedLines:
    """The lines of a descriptor, as they come, without the white space around them. Empty ones are left out.

    Args:
        descriptor: What is read. It is not closed.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._woken, self._wakes = os.pipe()
        self._lines = self._read()
        self._thread: Thread | None = None

    def first(self) -> str | None:
        """Wait for the first line; None if there is none."""
        return next(self._lines, None)

    def tell(self, hear: Callable[[str], object]) -> None:
        """Call a function with each further line, in a thread."""
        self._thread = Thread(target=lambda: [hear(line) for line in self._lines], name="lines")
        self._thread.start()

    def close(self) -> None:
        """End the thread; whatever comes later is not read."""
        os.close(self._wakes)
        if self._thread is not None:
            self._thread.join()
        os.close(self._woken)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> Iterator[str]:
        rest = b""
        while self._woken not in select.select([self._descriptor, self._woken], [], [])[0]:
            read = os.read(self._descriptor, LONGEST)
            *lines, rest = (rest + read).split(b"\n")
            if not read or len(rest) > LONGEST:
                lines, rest = [*lines, rest], b""
            yield from filter(None, (line.decode(errors="replace").strip() for line in lines))
            if not read:
                return
