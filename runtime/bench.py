"""Times a request's stages, several backends side by side in one process."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wanforge.engines.bundle import Bundle
from wanforge.runtime.backends import create_backend
from wanforge.runtime.pipeline import Pipeline, Progress, Request, Timings


@dataclass(frozen=True)
class Row:
    """One backend's times in seconds.

    Attributes:
        first_seconds: the run that loads and warms up.
        stages: every timed run of each stage.
    """

    backend: str
    first_seconds: float
    stages: dict[str, list[float]]

    def as_json(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "first_seconds": self.first_seconds,
            "stages": {
                name: {"median": statistics.median(runs), "min": min(runs), "max": max(runs), "runs": runs}
                for name, runs in self.stages.items()
            },
        }


def bench_request(
    bundle: Bundle,
    request: Request,
    backends: Sequence[str],
    repeats: int,
    progress: Progress = lambda *_: None,
) -> list[Row]:
    """Run a request `repeats` times on each backend, the backends taking turns, after one untimed run of each."""
    pipelines = {name: Pipeline(bundle, create_backend(name, bundle)) for name in backends}
    first = {name: sum(one_run(pipeline, request).values()) for name, pipeline in pipelines.items()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in backends}
    for turn in range(repeats):
        for place, (name, pipeline) in enumerate(pipelines.items(), 1):
            runs[name].append(one_run(pipeline, request))
            progress("bench", turn * len(pipelines) + place, repeats * len(pipelines))
    return [
        Row(name, first[name], {stage: [run[stage] for run in runs[name]] for stage in runs[name][0]})
        for name in backends
    ]


def one_run(pipeline: Pipeline, request: Request) -> dict[str, float]:
    """Seconds of each stage of one request, and their sum; frames are decoded and dropped."""
    timings = Timings()
    start = time.perf_counter()
    latents = pipeline.latents(pipeline.check(request), timings)
    for _ in pipeline.frames(latents, request.shape, timings):
        pass
    return {**timings.stages, "step": statistics.median(timings.steps), "total": time.perf_counter() - start}


def table(rows: Sequence[Row]) -> str:
    """Medians in milliseconds with the spread of the runs, a column per backend, and the ratio to the first."""
    lines = [
        f"{'stage':<10}" + "".join(f"{row.backend:>24}" for row in rows) + (f"{'ratio':>8}" if len(rows) > 1 else "")
    ]
    for stage in rows[0].stages:
        cells = ""
        for row in rows:
            runs = [1000 * s for s in row.stages[stage]]
            cells += f"{statistics.median(runs):>12.1f} ms ±{(max(runs) - min(runs)) / 2:>7.1f}"
        ratio = statistics.median(rows[-1].stages[stage]) / statistics.median(rows[0].stages[stage])
        lines.append(f"{stage:<10}{cells}" + (f"{ratio:>8.2f}" if len(rows) > 1 else ""))
    lines.append(f"{'first run':<10}" + "".join(f"{1000 * row.first_seconds:>12.1f} ms{'':>9}" for row in rows))
    return "\n".join(lines)
