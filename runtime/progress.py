"""Progress bars on stderr, for work that takes long enough to wonder."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Bars:
    """One bar at a time, by title: `bytes_of` counts bytes, calling the object counts parts of a stage.

    Nothing is shown where stderr is not a terminal, or `quiet` is set.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.off = quiet or not sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._title = ""

    def bytes_of(self, title: str, total: int) -> Callable[[int], None]:
        """A bar for a file; what it returns is told the size of each piece."""
        self._open(title, total, unit="B", unit_scale=True, unit_divisor=1000)
        return self._advance

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how much of a stage is done."""
        if self._title != stage or self._bar is None:
            self._open(stage, total)
        self._advance(done - (self._bar.n if self._bar is not None else 0))

    def _open(self, title: str, total: int, **options: object) -> None:
        self.close()
        self._title = title
        self._bar = tqdm(desc=title, total=total, leave=False, disable=self.off, **options)

    def _advance(self, amount: int) -> None:
        if self._bar is not None:
            self._bar.update(amount)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
