"""The results of a benchmark as JSON, as tables for a terminal and as a page with plots."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.measure.cost.stages import StageCost
from wanforge.runtime.measure.machine import Facts
from wanforge.runtime.measure.page import Plot, Series, document, heading, paragraph, plot, table
from wanforge.runtime.measure.quality.rates_plot import rates_plot
from wanforge.runtime.measure.requests.history import Trend
from wanforge.runtime.measure.requests.sweep import Sweep, SweepPoint
from wanforge.runtime.measure.requests.timing import Row
from wanforge.runtime.measure.tables import WIDTH, text_table
from wanforge.runtime.request import STAGES, Request

UNMEASURED = "unmeasured"
SHOWN = (*STAGES, "step", "total")


@dataclass(frozen=True)
class RequestReport:
    """The results of one benchmark.

    Attributes:
        costs: The cost of each stage, by GPU.
        here: The name of this machine's GPU in `costs`, if it is there.
        missing: Baselines that were not timed, and why.
        verdicts: Comparisons with earlier runs, by contender.
    """

    bundle: Bundle
    request: Request
    machine: Facts
    rows: Sequence[Row]
    costs: Mapping[str, Mapping[str, StageCost]] = field(default_factory=dict)
    here: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    sweeps: Sequence[Sweep] = ()
    verdicts: Mapping[str, Sequence[Trend]] = field(default_factory=dict)

    def title(self) -> str:
        shape, model = self.request.shape, self.bundle.model
        return (
            f"{model.name}, recipe {self.bundle.recipe.name}, {shape.width_px}x{shape.height_px}, {shape.frames} "
            f"frames, {shape.tokens} tokens, {self.request.steps or model.sampler.steps} steps"
        )

    def as_json(self) -> dict[str, Any]:
        shape = self.request.shape
        return {
            "model": self.bundle.model.name,
            "recipe": self.bundle.recipe.name,
            "width_px": shape.width_px,
            "height_px": shape.height_px,
            "frames": shape.frames,
            "tokens": shape.tokens,
            "steps": self.request.steps or self.bundle.model.sampler.steps,
            "machine": dict(self.machine),
            "rows": [row.as_json(shape.frames) for row in self.rows],
            "missing": dict(self.missing),
            "costs": {
                name: {"is_here": name == self.here, "stages": {k: c.as_json() for k, c in stages.items()}}
                for name, stages in self.costs.items()
            },
            "sweeps": [sweep.as_json() for sweep in self.sweeps],
            "verdicts": {name: [each.as_json() for each in found] for name, found in self.verdicts.items()},
        }


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def gigabytes(count: int | None) -> str:
    return UNMEASURED if count is None else f"{count / 1e9:.2f} GB"


def energy(joules: float | None) -> str:
    return UNMEASURED if joules is None else f"{joules:,.1f} J"


def stage_rows(report: RequestReport) -> tuple[list[str], list[list[str]]]:
    """Median, 95th percentile and spread of each stage by contender, beside the rooflines of GPUs."""
    header = ["ms"]
    for row in report.rows:
        header += [f"{row.contender} p50", "p95", "spread"]
    if len(report.rows) > 1:
        header += [f"{row.contender} / {report.rows[0].contender}" for row in report.rows[1:]]
    for name in report.costs:
        header += [f"{name} roofline", "" if name == report.here else f"{name} predicted"]
    stages = [stage for stage in SHOWN if stage in report.rows[0].stages]
    return [text for text in header if text], [stage_cells(report, stage) for stage in stages]


def stage_cells(report: RequestReport, stage: str) -> list[str]:
    cells = [stage]
    for row in report.rows:
        found = row.as_json(1)["stages"][stage]
        cells += [milliseconds(found["p50"]), milliseconds(found["p95"]), milliseconds(found["max"] - found["min"])]
    medians = [statistics.median(row.seconds(stage)) for row in report.rows]
    cells += [f"{median / medians[0]:.2f}" for median in medians[1:]]
    for name, stages in report.costs.items():
        cost = stages.get(stage)
        cells.append("-" if cost is None else f"{1000 * cost.roofline:.3g}")
        if name != report.here:
            cells.append("-" if cost is None else f"{1000 * cost.predicted:.3g}")
    return cells


def run_rows(report: RequestReport) -> list[list[str]]:
    """Figures of whole runs, by contender."""
    frames = report.request.shape.frames
    return [
        ["load, s", *(f"{row.load_seconds:.2f}" for row in report.rows)],
        ["first run, s", *(f"{row.first_seconds:.2f}" for row in report.rows)],
        ["peak host memory", *(gigabytes(row.host_bytes) for row in report.rows)],
        ["peak GPU memory", *(gigabytes(row.device_bytes) for row in report.rows)],
        ["energy per video", *(energy(row.joules) for row in report.rows)],
        ["energy per frame", *(energy(None if row.joules is None else row.joules / frames) for row in report.rows)],
    ]


def sweep_rows(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """A sweep as a table."""
    header = [sweep.parameter, "tokens", "total, ms", "step, ms", "host", "GPU", "energy", "PSNR, dB", "SSIM", "cosine"]
    has_rates = any(point.rates is not None for point in sweep.points)
    header += ["colour", "shape", "direction", "all"] if has_rates else []
    return header, [point_cells(point) for point in sweep.points]


def point_cells(point: SweepPoint) -> list[str]:
    clip, latents, meters = point.clip, point.latents, point.meters
    cells = [
        point.value,
        f"{point.tokens:,}",
        milliseconds(point.total_seconds),
        milliseconds(point.step_seconds),
        gigabytes(meters.host_bytes),
        gigabytes(meters.device_bytes),
        energy(meters.joules),
        f"{clip.psnr_db:.1f}",
        "-" if clip.ssim is None else f"{clip.ssim:.4f}",
        f"{latents.cosine:.6f}",
    ]
    rates = point.rates
    return cells + ([f"{x:.0%}" for x in (rates.colour, rates.shape, rates.direction, rates.all)] if rates else [])


def facts(machine: Facts) -> str:
    """What is known about the machine, in lines as wide as tables."""
    return fill(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None), WIDTH)


def notes(report: RequestReport) -> list[str]:
    """Remarks that the numbers need."""
    found = [f"{row.contender}: {row.note}" for row in report.rows if row.note]
    found += [f"{name}: not timed, {reason}" for name, reason in report.missing.items()]
    if report.rows and all(row.joules is None for row in report.rows):
        found.append("energy: unmeasured, NVML or a GPU is missing")
    for name in report.costs:
        if name != report.here:
            found.append(
                f"{name} is not this machine's GPU: its roofline is calculated, its prediction assumed, not measured"
            )
    return found


def text(report: RequestReport) -> str:
    """The report for a terminal."""
    parts = [report.title(), facts(report.machine)]
    if report.rows:
        parts += [
            text_table(*stage_rows(report)),
            text_table(["", *(r.contender for r in report.rows)], run_rows(report)),
        ]
    for sweep in report.sweeps:
        parts += [
            f"sweep of {sweep.parameter} on {sweep.backend}, against {sweep.against}",
            text_table(*sweep_rows(sweep)),
        ]
    parts += notes(report)
    for contender, found in report.verdicts.items():
        parts += [f"{each.verdict:<15}{contender} {said(each)}" for each in found]
    return "\n".join(parts)


def said(found: Trend) -> str:
    """A verdict in words."""
    if found.before is None or found.margin is None:
        return f"{found.name}: {milliseconds(found.now)} ms; {found.note}"
    change = f"{found.now / found.before - 1:+.1%}" if found.before else "-"
    return (
        f"{found.name}: {milliseconds(found.now)} ms, {milliseconds(found.before)} ms in {found.count} earlier runs, "
        f"{change}, {found.margin:.1%} allowed{'; ' + found.note if found.note else ''}"
    )


def page(report: RequestReport) -> str:
    """The report as HTML."""
    parts = [heading("Benchmark", 1), paragraph(report.title(), "soft")]
    if report.rows:
        parts += [heading("Stages"), table(*stage_rows(report)), stages_plot(report)]
        parts += [
            heading("Runs"),
            runs_plot(report),
            table(["", *(r.contender for r in report.rows)], run_rows(report)),
        ]
    for sweep in report.sweeps:
        parts += [
            heading(f"Sweep of {sweep.parameter}"),
            paragraph(f"{sweep.backend}, against {sweep.against}", "soft"),
        ]
        parts += [table(*sweep_rows(sweep)), *sweep_plots(sweep)]
    for contender, found in report.verdicts.items():
        parts.append(heading(f"{contender} against earlier runs"))
        parts.append(table(("verdict", ""), [[each.verdict, said(each)] for each in found], words=2))
    parts += [paragraph(note, "soft") for note in notes(report)]
    parts += [heading("Machine"), table(("", ""), [[k, str(v)] for k, v in report.machine.items() if v is not None])]
    return document(f"wanforge bench: {report.title()}", parts)


def stages_plot(report: RequestReport) -> str:
    """A plot of the median of each stage by contender, beside the rooflines of GPUs."""
    stages = [stage for stage in STAGES if stage in report.rows[0].stages]

    def points(name: str, seconds: Mapping[str, float]) -> list[tuple[float, float, str]]:
        found = [(i, 1000 * seconds[stage], stage) for i, stage in enumerate(stages) if stage in seconds]
        return [(i, max(ms, 1e-3), f"{name}, {stage}: {ms:.3g} ms") for i, ms, stage in found]

    series = [
        Series(r.contender, points(r.contender, {s: statistics.median(r.seconds(s)) for s in stages}), is_joined=False)
        for r in report.rows
    ]
    for name, costs in report.costs.items():
        series.append(
            Series(f"{name} roofline", points(f"{name} roofline", {s: c.roofline for s, c in costs.items()}), False)
        )
    return plot(Plot("median of each stage", "stage", "ms", series, log_y=True, x_names=stages))


def runs_plot(report: RequestReport) -> str:
    """A plot of every timed run, to see whether the machine was quiet."""
    series = [
        Series(
            r.contender,
            [(i + 1, 1000 * s, f"run {i + 1}: {1000 * s:.1f} ms") for i, s in enumerate(r.seconds("total"))],
        )
        for r in report.rows
    ]
    return plot(Plot("whole request, run by run", "run", "ms", series))


def sweep_plots(sweep: Sweep) -> list[str]:
    """Plots of time, similarity and, where they were counted, rates over the parameter."""
    numbers = [is_number(point.value) for point in sweep.points]
    places = [float(p.value) if all(numbers) else float(i) for i, p in enumerate(sweep.points)]
    names = [] if all(numbers) else [point.value for point in sweep.points]

    def chart(title: str, y: str, values: Sequence[float | None]) -> str:
        points = [
            (x, v, f"{sweep.parameter} {p.value}: {v:.4g}")
            for x, v, p in zip(places, values, sweep.points, strict=True)
            if v is not None
        ]
        return plot(Plot(title, sweep.parameter, y, [Series("", points)], x_names=names))

    rated = [(x, p.value, p.rates) for x, p in zip(places, sweep.points, strict=True) if p.rates is not None]
    return [
        chart("time of a request", "ms", [1000 * point.total_seconds for point in sweep.points]),
        chart(
            f"clip against {sweep.against}",
            "PSNR, dB",
            [p.clip.psnr_db for p in sweep.points],
        ),
        *([plot(rates_plot(sweep.parameter, rated, names))] if rated else []),
    ]


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
