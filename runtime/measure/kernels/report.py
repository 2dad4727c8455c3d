"""The results of a benchmark of ops, as JSON and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wanforge.configs.targets import Target
from wanforge.runtime.measure.cost.launches import Workload, seconds
from wanforge.runtime.measure.kernels.checks import KernelVerdict
from wanforge.runtime.measure.kernels.timing import KERNEL, Case, Times
from wanforge.runtime.measure.tables import text_table

UNMEASURED = "unmeasured: no GPU"


@dataclass(frozen=True)
class KernelResult:
    """The result of one case.

    Attributes:
        times: By contender, `KERNEL` first; empty where nothing was measured.
        missing: Baselines that this machine lacks, and why.
        target: The GPU's peaks, where they are known.
    """

    op: str
    case: Case
    times: Mapping[str, Times] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    target: Target | None = None

    @property
    def kernel(self) -> Times | None:
        return self.times.get(KERNEL)

    @property
    def tflops(self) -> float | None:
        """Operations of matrix products per second, in units of 10^12; None where the case has none."""
        return self.case.flops / self.kernel.median / 1e12 if self.kernel and self.case.flops else None

    @property
    def gbs(self) -> float | None:
        """The bytes that must be moved, divided by the time, in units of 10^9 per second."""
        return self.case.bytes / self.kernel.median / 1e9 if self.kernel else None

    @property
    def roofline(self) -> float | None:
        """The least seconds that the launches can take at the GPU's peaks."""
        return seconds(self.case.costs, self.target) if self.target else None

    @property
    def share(self) -> float | None:
        """The share of the roofline's speed that was reached."""
        return self.roofline / self.kernel.median if self.kernel and self.roofline else None

    def ratio(self, baseline: str) -> float | None:
        """A baseline's time divided by the kernel's; above one, the kernel is faster."""
        return self.times[baseline].median / self.kernel.median if self.kernel and baseline in self.times else None

    def as_json(self) -> dict[str, Any]:
        none = dict.fromkeys(("median_ms", "p20_ms", "p80_ms"))

        def timed(name: str) -> dict[str, Any]:
            return self.times[name].as_json() if name in self.times else none

        return {
            "op": self.op,
            "case": self.case.name,
            "flops": self.case.flops,
            "bytes": self.case.bytes,
            **timed(KERNEL),
            "tflops": self.tflops,
            "gbs": self.gbs,
            "roofline_ms": None if self.roofline is None else 1000 * self.roofline,
            "share_of_roofline": self.share,
            "baselines": {
                name: {**timed(name), "ratio": self.ratio(name), "missing": self.missing.get(name)}
                for name in self.case.contenders[1:]
            },
        }


@dataclass(frozen=True)
class KernelReport:
    """Everything that `bench.bench_ops` found.

    Attributes:
        machine: What it ran on, by name; None where unknown.
        results: Of every case, except those of ops that failed their check.
    """

    workload: Workload
    machine: Mapping[str, str | None]
    repeats: int
    verdicts: Sequence[KernelVerdict]
    results: Sequence[KernelResult]

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def note(self) -> str | None:
        return None if self.machine["gpu"] else UNMEASURED

    def as_json(self) -> dict[str, Any]:
        w = self.workload
        return {
            "model": w.model.name,
            "width_px": w.shape.width_px,
            "height_px": w.shape.height_px,
            "frames": w.shape.frames,
            "tokens": w.L,
            "num_selected": w.num_selected,
            "machine": dict(self.machine),
            "note": self.note,
            "repeats": self.repeats,
            "passed": self.passed,
            "checks": [verdict.as_json() for verdict in self.verdicts],
            "results": [result.as_json() for result in self.results],
        }


HEAD = ("", "GFLOP", "MB", "ms", "p20", "p80", "TFLOP/s", "GB/s", "of roofline", "x kernel")


def table(report: KernelReport) -> str:
    """The report as text: the machine, the checks, then each case with its baselines below it, whose last column is
    their time divided by the kernel's."""
    w = report.workload
    wrong = sorted({verdict.op for verdict in report.verdicts if not verdict.passed})
    lines = [
        f"{w.model.name}, {w.shape.width_px}x{w.shape.height_px}, {w.shape.frames} frames, {w.L} tokens",
        ", ".join(f"{name} {value}" for name, value in report.machine.items() if value),
        *map(str, report.verdicts),
        *(f"{op} is wrong here and was not timed" for op in wrong),
        report.note or f"{report.repeats} runs of each",
    ]
    rows = [row for result in report.results for row in rows_of(result)]
    return "\n".join([*lines, text_table(HEAD, rows)])


def rows_of(result: KernelResult) -> list[tuple[str, ...]]:
    """A kernel's row and, where there are times, those of its baselines."""

    def timed(name: str) -> list[str]:
        times = result.times.get(name)
        return [f"{1000 * t:.4f}" for t in (times.median, times.p20, times.p80)] if times else 3 * ["-"]

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    work = [f"{result.case.flops / 1e9:.1f}", f"{result.case.bytes / 1e6:.1f}"]
    speed = [cell(result.tflops, ".1f"), cell(result.gbs, ".0f"), cell(result.share, ".0%")]
    rows = [(result.case.name, *work, *timed(KERNEL), *speed, "")]
    for name in result.case.contenders[1:]:
        if name in result.times:
            rows.append((f"  {name}", "", "", *timed(name), "", "", "", cell(result.ratio(name), ".2f")))
        elif name in result.missing:
            rows.append((f"  {name}: unavailable, {result.missing[name]}", *9 * [""]))
    return rows
