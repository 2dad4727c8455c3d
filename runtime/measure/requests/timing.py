"""Times the stages of whole requests, several contenders side by side in one process."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wanforge.engines.bundle.bundle import Bundle
from wanforge.progress import Progress, silent
from wanforge.runtime.backends import create_backend
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.baselines import BASELINES, create_baseline
from wanforge.runtime.measure.requests.meters import Nvml, ResourceUse, metered
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import STAGES, Request
from wanforge.whole_file import temporary_folder


@dataclass(frozen=True)
class Row:
    """The timed requests of one contender.

    Attributes:
        load_seconds: Time to open the bundle and make the backend ready.
        first_seconds: Time of the first request, which compiles and maps what it needs.
        runs: Seconds of each stage of every timed request, of its median ``step``, and of the whole (``total``).
        meters: Memory and energy of every timed request.
        note: What it computes, where that differs from the others.
    """

    contender: str
    load_seconds: float
    first_seconds: float
    runs: list[dict[str, float]] = field(default_factory=list)
    meters: list[ResourceUse] = field(default_factory=list)
    note: str = ""

    @property
    def stages(self) -> list[str]:
        """The stages of this request, followed by ``step`` and ``total``."""
        return list(self.runs[0])

    def seconds(self, stage: str) -> list[float]:
        """Every timed run of a stage."""
        return [run[stage] for run in self.runs]

    @property
    def host_bytes(self) -> int:
        return max(reading.host_bytes for reading in self.meters)

    @property
    def device_bytes(self) -> int | None:
        found = [reading.device_bytes for reading in self.meters if reading.device_bytes is not None]
        return max(found) if found else None

    @property
    def joules(self) -> float | None:
        """Median energy of a video."""
        found = [reading.joules for reading in self.meters if reading.joules is not None]
        return statistics.median(found) if found else None

    def as_json(self, frames: int) -> dict[str, Any]:
        return {
            "contender": self.contender,
            "note": self.note,
            "load_seconds": self.load_seconds,
            "first_seconds": self.first_seconds,
            "stages": {stage: spread(self.seconds(stage)) for stage in self.stages},
            "peak_host_bytes": self.host_bytes,
            "peak_device_bytes": self.device_bytes,
            "joules_per_video": self.joules,
            "joules_per_frame": None if self.joules is None else self.joules / frames,
        }


def spread(runs: Sequence[float]) -> dict[str, Any]:
    """Median, 95th percentile, extremes, and the runs themselves."""
    p50, p95 = np.percentile(runs, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "min": min(runs), "max": max(runs), "runs": list(runs)}


def make_pipeline(bundle: Bundle, contender: str) -> Pipeline:
    """A pipeline for a contender, which is a backend or a baseline by name."""
    create = create_baseline if contender in BASELINES else create_backend
    return Pipeline(bundle, create(contender, bundle))


def bench_request(
    bundle: Bundle,
    request: Request,
    contenders: Sequence[str],
    repeats: int,
    warm_up: int = 1,
    progress: Progress = silent,
) -> list[Row]:
    """Run a request `repeats` times on each contender, the contenders taking turns.

    Args:
        warm_up: Runs of each contender before the timed ones, at least one; the first is reported separately.
    """
    pipelines, rows = {}, []
    nvml = Nvml.open()
    with temporary_folder() as folder:
        out = folder / "clip.mp4"
        for name in contenders:
            graphs.cache_clear()  # made for the previous contender
            start = time.perf_counter()
            pipelines[name] = make_pipeline(bundle, name)
            pipelines[name].check(request)
            loaded = time.perf_counter()
            untimed = [one_run(pipelines[name], request, out)["total"] for _ in range(warm_up)]
            rows.append(Row(name, loaded - start, untimed[0], note=pipelines[name].backend.note))
        for turn in range(repeats):
            order = rows if turn % 2 == 0 else list(reversed(rows))
            for place, row in enumerate(order, 1):
                with metered(nvml) as reading:
                    row.runs.append(one_run(pipelines[row.contender], request, out))
                row.meters.append(reading)
                progress("bench", turn * len(rows) + place, repeats * len(rows))
    return rows


def one_run(pipeline: Pipeline, request: Request, out: Path) -> dict[str, float]:
    """Seconds of each stage of one request, from prompt to video file, of its median step, and of the whole."""
    start = time.perf_counter()
    timings = pipeline.write_video(pipeline.check(request), out)
    total = time.perf_counter() - start
    named = {stage: timings.stages[stage] for stage in STAGES if stage in timings.stages}
    return {**named, "step": statistics.median(timings.steps), "total": total}
