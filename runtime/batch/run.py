"""A run of a batch: what is there already, what is missing, and the making of that."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from msgspec.structs import replace

from wanforge.errors import RequestError
from wanforge.progress import Overall
from wanforge.runtime.batch.manifest import Ending, ManifestLine, SetApart, StoredClip, read_manifest, write_manifest
from wanforge.runtime.batch.orders import ClipOrder, Ordering, PlacedOrder
from wanforge.runtime.batch.report import BatchReport, Effort
from wanforge.runtime.batch.team import Team
from wanforge.runtime.inputs.prompts import BadLine, PromptLine
from wanforge.runtime.progress import Bars
from wanforge.runtime.service.results.base import ObjectStorage

NOTE_SECONDS = 5.0
"""How often the manifest is written while clips are made."""
NOTE_SHARE = 0.02
"""The most of the time that writing it may take."""
MOST_SHOWN = 20
"""How many wrong lines a message lists."""
STAGE = "clips"

Hiring = Callable[[int], AbstractContextManager[Team]]
"""Called with the number of clips to make, and gives the team that makes them."""


@dataclass
class BatchRun:
    """A run of a batch.

    Attributes:
        orders: All clips that are asked for, in the order of their lines, and `bad`, the lines that are wrong.
        endings: What became of clips so far, by key.
        others: The manifest's lines of clips that are there and that only earlier runs were asked for.
    """

    ordering: Ordering
    storage: ObjectStorage
    out: str
    orders: list[PlacedOrder] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    endings: dict[str, Ending] = field(default_factory=dict)
    others: list[ManifestLine] = field(default_factory=list)
    _note_due: float = 0.0

    def read(self, lines: Sequence[PromptLine | BadLine], *, skip_bad: bool) -> list[ClipOrder]:
        """Check every line, and find out which clips are missing.

        Raises:
            RequestError: Lines are wrong, and they are not to be skipped or there are no others.
        """
        stored = {each.name: each.bytes for each in self.storage.stored()}
        earlier = read_manifest(self.storage)
        for key, line in earlier.items():
            if stored.get(name := f"{key}.mp4") not in (None, line.bytes):
                del stored[name]  # something else has been written there since
        self.orders, self.bad = self.ordering.read(lines, stored)
        check_lines(self.bad, self.orders, skip_bad=skip_bad)
        missing = dict[str, ClipOrder]()
        for each in self.orders:
            key, name = each.order.key, each.order.name
            if name in stored:
                known = earlier[key].stored_clip if key in earlier else None
                self.endings[key] = known or StoredClip(bytes=stored[name])
            else:
                missing[key] = each.order
        left = earlier.keys() - self.endings.keys()
        self.others = [replace(line, line=None) for key, line in earlier.items() if key in left and line.file in stored]
        return list(missing.values())

    def make(self, missing: Sequence[ClipOrder], hire: Hiring, price_per_hour: float | None = None) -> Effort:
        """Make the clips that are missing. The manifest is written now and then, and at the end, whatever that is."""
        if not missing:
            self.note()
            return Effort()
        begun = time.monotonic()
        with hire(len(missing)) as team, Bars(Overall({STAGE: 1.0})) as bars:
            try:
                bars(STAGE, 0, len(missing))
                for done, (order, ending) in enumerate(team.make(missing), 1):
                    self.endings[order.key] = ending
                    bars(STAGE, done, len(missing))
                    self._note_if_due()
            finally:
                self.note()
                team.close()
        return Effort(
            workers=team.size,
            seconds=time.monotonic() - begun,
            busy_seconds=team.tally.busy_seconds,
            deaths=team.tally.deaths,
            price_per_hour=price_per_hour,
        )

    def report(self, missing: Sequence[ClipOrder], effort: Effort) -> BatchReport:
        """What to tell of the run."""
        made = sum(isinstance(self.endings.get(order.key), StoredClip) for order in missing)
        failed = sum(isinstance(self.endings.get(each.order.key), SetApart) for each in self.orders)
        clips = len(self.orders) + len(self.bad)
        return BatchReport(
            out=self.out,
            clips=clips,
            there=len(self.orders) - failed - made,
            made=made,
            failed=failed + len(self.bad),
            **effort.figures(made),  # type: ignore[arg-type]
        )

    def _note_if_due(self) -> None:
        if time.monotonic() >= self._note_due:
            begun = time.monotonic()
            self.note()
            took = time.monotonic() - begun
            self._note_due = time.monotonic() + max(NOTE_SECONDS, took / NOTE_SHARE)

    def note(self) -> None:
        """Write the manifest as things stand."""
        write_manifest(self.storage, self.orders, self.endings, self.bad, self.others)


def check_lines(bad: Sequence[BadLine], orders: Sequence[PlacedOrder], *, skip_bad: bool) -> None:
    """Refuse wrong lines, all of them at once, unless they are to be set apart.

    Raises:
        RequestError: There are some and they are not to be skipped, or there is no other line.
    """
    if bad and not (skip_bad and orders):
        shown = "\n".join(str(line.error) for line in bad[:MOST_SHOWN])
        more = f"\nand {len(bad) - MOST_SHOWN} more" if len(bad) > MOST_SHOWN else ""
        advice = "correct them" if skip_bad else "correct them, or make the other clips with --skip-bad"
        count = "1 line is" if len(bad) == 1 else f"{len(bad)} lines are"
        raise RequestError(f"{count} wrong, so nothing was made; {advice}:\n{shown}{more}")
