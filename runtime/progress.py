"""Progress bars on stderr, for work that takes a while."""

import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Bars:
    """Shows progress as one bar at a time.

    Nothing is shown if stderr is not a terminal, or if `quiet` is set.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.off = quiet or not sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._title = ""

    def __call__(self, stage: str, done: int, total: int, unit: str = "", /) -> None:
        """Show how much of a stage is done."""
        if self._title != stage or self._bar is None:
            self.close()
            self._title = stage
            options: dict[str, object] = {"unit": unit, "unit_scale": True, "unit_divisor": 1000} if unit else {}
            self._bar = tqdm(desc=stage, total=total, leave=False, disable=self.off, **options)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
