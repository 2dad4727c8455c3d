"""Progress on stderr: bars on a terminal, and elsewhere a line of the log now and then."""

import logging
import sys
import time
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Self

from wanforge.logs import PROGRESS, is_json
from wanforge.progress import Overall, amount, clock

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("wanforge.stages")

SECONDS_BETWEEN = 10.0
"""The least time between two lines, and before the first, so that short work is silent."""
SHARE_BETWEEN = 0.05
"""The least share of the time so far between two lines, so that long work does not fill the log."""


class Bars:
    """Shows progress as one bar: of each stage, or of the whole work if its stages are declared. Without tqdm there are
    lines of the log on a terminal, too.

    Args:
        overall: The stages of the whole work.
    """

    def __init__(self, overall: Overall | None = None) -> None:
        self.overall = overall
        self.has_terminal = sys.stderr.isatty() and not is_json() and find_spec("tqdm") is not None
        self._bar: tqdm | None = None
        self._stage = ""
        self._begun = self._stage_begun = self._latest = self._told = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, unit: str = "", /) -> None:
        """Show how much of a stage is done."""
        if stage != self._stage:
            if self.overall is None:
                self.close()
            self._end_stage()
            self._stage = stage
        self._latest = time.monotonic()
        if self.overall is not None:
            self.overall.report(stage, done, total)
        if self.has_terminal:
            self._draw(done, total, unit)
        else:
            self._tell(done, total, unit)

    def close(self) -> None:
        """Remove the bar from the screen until there is more to show, and end the stage."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._end_stage()

    def _draw(self, done: int, total: int, unit: str) -> None:
        from tqdm import tqdm

        if self.overall is None:
            if self._bar is None:
                options = {"unit": unit, "unit_scale": True, "unit_divisor": 1000} if unit else {}
                self._bar = tqdm(desc=self._stage, total=total, leave=False, **options)
            self._bar.update(done - self._bar.n)
            return
        if self._bar is None:
            form = "{percentage:3.0f}%|{bar}| {desc}{postfix}"
            self._bar = tqdm(total=1.0, leave=False, bar_format=form, miniters=0)
        self._bar.set_description_str(f"{self._stage} {amount(done, total, unit)}", refresh=False)
        self._bar.set_postfix_str(self._times(), refresh=False)
        self._bar.update(self.overall.share - self._bar.n)

    def _tell(self, done: int, total: int, unit: str) -> None:
        elapsed = self._latest - self._begun
        if self._latest - self._told < max(SECONDS_BETWEEN, SHARE_BETWEEN * elapsed):
            return
        self._told = self._latest
        share = "" if self.overall is None else f"{self.overall.share:4.0%} done, "
        fields: dict[str, object] = {"stage": self._stage, "done": done, "total": total, "elapsed_seconds": elapsed}
        if self.overall is not None:
            fields |= {"share": self.overall.share, "left_seconds": self.overall.seconds_left()}
        PROGRESS.info("%s%s %s, %s", share, self._stage, amount(done, total, unit), self._times(), extra=fields)

    def _times(self) -> str:
        """The time that has passed, and the time that is left if it is known."""
        passed = f"{clock(self._latest - self._begun)} passed"
        left = None if self.overall is None else self.overall.seconds_left()
        return passed if left is None else f"{passed}, about {clock(left)} left"

    def _end_stage(self) -> None:
        """Log how long the stage took."""
        if self._stage:
            seconds = self._latest - self._stage_begun
            log.info("%s took %.2f s", self._stage, seconds, extra={"stage": self._stage, "seconds": seconds})
        self._stage_begun, self._stage = self._latest, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
