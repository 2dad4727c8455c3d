"""The suite's results: lines for a terminal, JSON, and docs/benchmarks.md with its plot."""

import statistics
from collections.abc import Sequence
from typing import Any

from wanforge.exporter.studies.suite import HOST_LIMIT, ORT_LIMIT, RECORDED_LIMIT, SMS, Scale, Suite
from wanforge.runtime.measure.page import Plot, Series, picture_of
from wanforge.runtime.measure.requests.report import facts
from wanforge.runtime.measure.requests.timing import spread
from wanforge.runtime.measure.tables import markdown_table, text_table
from wanforge.runtime.request import STAGES

COMMAND = "wanforge suite --markdown docs/benchmarks.md"
PLOT = "benchmarks.svg"


def as_json(suite: Suite) -> dict[str, Any]:
    """The results as plain values."""
    return {
        "machine": dict(suite.machine),
        "scales": [
            {
                "model": scale.name,
                "layers": scale.layers,
                "block_parameters": scale.parameters,
                "export": spread(scale.export_seconds),
                "build": spread(scale.build_seconds) if scale.build_seconds else None,
                "host_step": spread(scale.host.seconds),
                "host_launches": scale.host.launches,
                "host_recorded": spread(scale.host.recorded),
            }
            for scale in suite.scales
        ],
        "rows": [row.as_json(1) for row in suite.rows],
        "ort_over_torch": suite.ort_ratio,
        "missing": list(suite.missing),
    }


def span(runs: Sequence[float], unit: float, form: str) -> str:
    """The median and the extremes of the runs, as text."""
    if not runs:
        return "unmeasured"
    middle, low, high = (format(unit * x, form) for x in (statistics.median(runs), min(runs), max(runs)))
    return f"{middle} ({low} to {high})"


def scale_rows(suite: Suite) -> list[list[str]]:
    return [
        [
            scale.name,
            str(scale.layers),
            f"{scale.parameters / 1e9:.3g}",
            span(scale.export_seconds, 1, ".2f"),
            span(scale.build_seconds, 1, ".2f"),
        ]
        for scale in suite.scales
    ]


def host_rows(suite: Suite) -> list[list[str]]:
    rows = []
    for scale in suite.scales:
        found, recorded, launches = spread(scale.host.seconds), spread(scale.host.recorded), scale.host.launches
        times = (f"{1e3 * found['p50']:.2f}", f"{1e3 * found['p95']:.2f}", f"{1e6 * found['p50'] / launches:.1f}")
        again = (f"{1e3 * recorded['p50']:.3f}", f"{1e3 * recorded['p95']:.3f}")
        rows.append([scale.name, str(scale.layers), str(launches), *times, *again])
    return rows


def request_rows(suite: Suite) -> list[list[str]]:
    first, second = suite.rows
    rows = []
    for stage in (*(s for s in STAGES if s in first.stages), "step", "total"):
        one, two = (spread(row.seconds(stage)) for row in (first, second))
        cells = [f"{1e3 * found[key]:,.1f}" for found in (one, two) for key in ("p50", "p95")]
        rows.append([stage, *cells, f"{two['p50'] / one['p50']:.2f}"])
    return rows


SCALES = ["model", "layers", "parameters of its layers, 10^9", "export, s", "build, s"]
HOST = [
    *("model", "layers", "launches", "p50, ms", "p95, ms", "per launch, us"),
    *("recorded p50, ms", "recorded p95, ms"),
]


def text(suite: Suite) -> str:
    """The results as text for a terminal."""
    names = [row.contender for row in suite.rows]
    header = ["ms", *(f"{name} {key}" for name in names for key in ("p50", "p95")), "ratio"]
    parts = [
        facts(suite.machine),
        text_table(SCALES, scale_rows(suite)),
        "host time of a step of the backend cuda, launched and recorded, with a GPU that does nothing",
        text_table(HOST, host_rows(suite)),
        text_table(header, request_rows(suite)),
        *promises(suite),
        *suite.missing,
    ]
    return "\n".join(parts)


def promises(suite: Suite) -> list[str]:
    """The promised limits, and whether they hold here."""
    thirty = next(scale for scale in suite.scales if scale.layers == 30)
    host, recorded = (statistics.median(runs) for runs in (thirty.host.seconds, thirty.host.recorded))

    def verdict(holds: bool) -> str:
        return "within" if holds else "ABOVE"

    return [
        f"A step of 30 layers takes {1e3 * host:.2f} ms of host time: {verdict(host <= HOST_LIMIT)} the limit of "
        f"{1e3 * HOST_LIMIT:g} ms.",
        f"A recorded step of 30 layers takes {1e3 * recorded:.3f} ms of host time: "
        f"{verdict(recorded <= RECORDED_LIMIT)} the limit of {1e3 * RECORDED_LIMIT:g} ms.",
        f"ONNX Runtime takes {suite.ort_ratio:.2f} of eager PyTorch's time for the tiny clip: "
        f"{verdict(suite.ort_ratio <= ORT_LIMIT)} the limit of {ORT_LIMIT:g}.",
    ]


def page(suite: Suite) -> str:
    """The page docs/benchmarks.md."""
    machine = suite.machine
    gpu = f" and a {machine['gpu']}" if machine.get("gpu") else ""
    versions = ("python", "torch", "onnxruntime-gpu", "onnxruntime", "tensorrt-rtx", "wanforge", "commit")
    names = [row.contender for row in suite.rows]
    header = ["", *(f"{name} {key}, ms" for name in names for key in ("p50", "p95")), "ratio of medians"]
    sms = " and ".join(f"sm_{sm}" for sm in SMS)
    parts = [
        "# Benchmarks",
        f"Written by `{COMMAND}`, which `make bench` runs. Do not edit. Nothing here needs a GPU; predictions for GPUs "
        "are in [scaling.md](scaling.md).",
        f"Measured on a machine with {machine['processors']} processors ({machine['cpu']}), "
        f"{machine['memory_gb']} GB of memory{gpu}, at a load of {machine['load']} at the end, with "
        + ", ".join(f"{name} {machine[name]}" for name in versions if machine.get(name))
        + ". On a machine that does other work as well, ratios say more than times.",
        *(f"- {promise}" for promise in promises(suite)),
        "## Export and build, as models grow",
        "Export writes every graph in three compute types; build compiles the six graphs of the denoiser with "
        f"TensorRT-RTX for {sms}. Each time is the median of {len(suite.scales[0].export_seconds)} runs, with the "
        "extremes. Weights are inputs of the graphs, so their size costs no time: the files here are headers followed "
        "by a hole.",
        markdown_table(SCALES, scale_rows(suite)),
        f"![Seconds of export and build over the model's size]({PLOT})",
        "## Host time of a step",
        "A step of the backend `cuda` in requests of four steps for one token, with a GPU that does nothing: "
        "casting the latents and cutting them into patches, binding and running every block up to the call of "
        "`cuLaunchKernel`, and assembling the velocity. Stem and head are left out. A recorded step has one call that "
        "replays a CUDA graph in place of all launches. What the driver takes for a launch or a graph is unmeasured.",
        markdown_table(HOST, host_rows(suite)),
        "## ONNX Runtime against eager PyTorch",
        "Both run the tiny model's own clip with W8A8 and SageSLA, on the CPU in float32, and take turns.",
        markdown_table(header, request_rows(suite)),
        *(f"- Left out: {reason}" for reason in suite.missing),
    ]
    lists = "\n\n".join(parts).replace("\n\n- ", "\n- ").replace("times.\n- ", "times.\n\n- ")
    return lists + "\n"


def scaling_plot(suite: Suite) -> str:
    """The plot that lies beside the page."""

    def series(name: str, runs: Sequence[tuple[Scale, Sequence[float]]]) -> Series:
        points = [
            (s.parameters / 1e9, statistics.median(r), f"{s.name}: {statistics.median(r):.2f} s") for s, r in runs if r
        ]
        return Series(name, points)

    lines = [
        series("export", [(scale, scale.export_seconds) for scale in suite.scales]),
        series("build", [(scale, scale.build_seconds) for scale in suite.scales]),
    ]
    chart = Plot(
        "seconds over parameters", "parameters of the layers, 10^9", "s", [s for s in lines if s.points], log_x=True
    )
    return picture_of(chart)
