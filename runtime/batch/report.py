"""What a batch tells of itself at its end."""

from dataclasses import dataclass

from wanforge.configs.loading import Record
from wanforge.progress import clock


class BatchReport(Record, frozen=True, kw_only=True):
    """How a batch went.

    Attributes:
        out: Where the clips and the manifest are.
        clips: How many the prompt file asks for, bad lines included. `there` of them were made by an earlier run, or
            are the same as another; `made` were made now, and `failed` are set apart with their errors.
        seconds: From the start of the workers to their end.
        clips_per_second: None where nothing was made, like what follows.
        utilisation: The share of the time of all workers in which they made clips; the rest is starting and waiting.
        deaths: How many processes died.
        cost: What the machines cost in that time, and `cost_per_clip`; None without a price.
    """

    out: str
    clips: int
    there: int
    made: int
    failed: int
    workers: int = 0
    seconds: float = 0.0
    clips_per_second: float | None = None
    utilisation: float | None = None
    deaths: int = 0
    cost: float | None = None
    cost_per_clip: float | None = None


@dataclass(frozen=True)
class Effort:
    """What the clips that were made took.

    Attributes:
        workers: How many made them.
        seconds: The time that passed, and `busy_seconds`, that in which workers made clips, all of them together.
        deaths: How many processes died.
        price_per_hour: What all machines cost; None if that is not known.
    """

    workers: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    deaths: int = 0
    price_per_hour: float | None = None

    def figures(self, made: int) -> dict[str, float | int | None]:
        """The figures of a report on some clips."""
        if not self.seconds:
            return {}
        cost = None if self.price_per_hour is None else self.price_per_hour * self.seconds / 3600
        return {
            "workers": self.workers,
            "seconds": self.seconds,
            "deaths": self.deaths,
            "clips_per_second": made / self.seconds,
            "utilisation": self.busy_seconds / (self.workers * self.seconds),
            "cost": cost,
            "cost_per_clip": cost / made if cost is not None and made else None,
        }


def told(report: BatchReport) -> str:
    """A report for people."""
    rows = [f"{report.out}: {report.clips} clips, {report.made} made, {report.there} there already"]
    if report.failed:
        rows[0] += f", {report.failed} failed (manifest.jsonl says why)"
    if report.clips_per_second is not None and report.utilisation is not None:
        rows.append(
            f"  {clock(report.seconds)} with {report.workers} worker{'s' if report.workers > 1 else ''}, "
            f"{report.clips_per_second:.3f} clips a second, {report.utilisation:.0%} of the time used"
        )
    if report.deaths:
        rows.append(f"  {report.deaths} processes died, and others took their place")
    if report.cost is not None:
        each = "" if report.cost_per_clip is None else f", {report.cost_per_clip:.6g} for each clip"
        rows.append(f"  cost: {report.cost:.4g}{each}")
    return "\n".join(rows)
