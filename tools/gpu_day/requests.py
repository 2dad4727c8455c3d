"""The parts that time whole requests of a model with random weights, and profile one step and one chunk of the VAE."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tools.gpu_day.day import Day
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.checkpoint.synthetic.drawn_weights import DrawnWeights
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.runtime.backends.cuda import CudaBackend
from wanforge.runtime.measure.cost.stages import costs_on
from wanforge.runtime.measure.requests.meters import Nvml, metered
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings, latent_shape
from wanforge.runtime.schedule import vae_schedule
from wanforge.whole_file import temporary_folder

LARGEST_TRACE = 8 << 20
"""The most bytes of a trace that is kept."""
TOP = 25
"""How many kernels a profile lists."""


def run(day: Day) -> None:
    """Time requests from the prompt to frames on the host; the first draws the weights and is listed apart. Videos are
    not encoded, because the encoder may be missing."""
    with temporary_folder() as folder:
        pipeline, request = opened(day, folder)
        _predict(day, pipeline.bundle, request)
        nvml = Nvml.open()
        for number in range(1 + day.scale.requests):
            day.once("request", f"{number}", lambda: _one(day, pipeline, request, nvml))


def run_profile(day: Day) -> None:
    """Profile one step of the denoiser and one chunk of the VAE, each after a run that is not profiled."""
    with temporary_folder() as folder:
        pipeline, request = opened(day, folder)
        day.once("profile", "step", lambda: _profiled(day, "step", _step(pipeline, request)))
        day.once("profile", "VAE chunk", lambda: _profiled(day, "vae", _chunk(pipeline, request)))


def opened(day: Day, folder: Path) -> tuple[Pipeline, Request]:
    """A pipeline for a model whose weights are drawn on the device, and a request for it."""
    bundle = skeleton(folder, day.model, day.recipe)
    backend = CudaBackend(bundle, day.dtype)
    backend.weights = DrawnWeights(bundle, day.device.device)
    return Pipeline(bundle, backend), Request(day.model.example_prompt, day.shape, steps=day.scale.steps)


def _predict(day: Day, bundle: Bundle, request: Request) -> None:
    target = day.device.target
    if target is not None and not day.results.of(day.part, "stages"):
        checked = Pipeline(bundle, CudaBackend(bundle, day.dtype)).resolve(request)
        day.add("stages", stages={name: cost.as_json() for name, cost in costs_on(bundle, checked, target).items()})


def _one(day: Day, pipeline: Pipeline, request: Request, nvml: Nvml | None) -> dict[str, Any]:
    """One request: the seconds of each stage and step, memory and energy."""
    day.device.peak_bytes()
    with metered(nvml) as reading:
        start = time.perf_counter()
        clip = pipeline.make(request)
        total = time.perf_counter() - start
    return {
        "seconds": {**clip.timings.stages, "total": total},
        "steps": clip.timings.steps,
        "finite": bool(torch.isfinite(clip.latents).all()),
        "host_bytes": reading.host_bytes,
        "device_bytes": reading.device_bytes,
        "tensor_bytes": day.device.peak_bytes(),
        "joules": reading.joules,
    }


def _step(pipeline: Pipeline, request: Request) -> Callable[[], object]:
    checked = pipeline.check(request)
    denoiser = pipeline.denoiser(checked, Timings())
    noise = next(iter(pipeline.noise(checked))).to(pipeline.backend.device)
    first = checked.steps[0]
    return lambda: denoiser(noise, first)


def _chunk(pipeline: Pipeline, request: Request) -> Callable[[], object]:
    pipeline.backend.prepare(request.shape)
    session = pipeline.backend.session(vae_schedule(pipeline.graphs, request.shape, "decode"))
    latents = torch.randn(latent_shape(pipeline.model, request.shape))
    session["first_latent"].copy_(latents[:, :, :1])
    session["latent"].copy_(latents[:, :, 1:2])
    session.run("first")

    def chunk() -> None:
        session.run("next.0")
        pipeline.backend.synchronise()

    return chunk


def _profiled(day: Day, name: str, work: Callable[[], object]) -> dict[str, Any]:
    """The operations that take longest, on the GPU where there is one. A small trace is kept beside the results."""
    on_gpu = day.device.device.type == "cuda"
    if not day.rehearses:
        work()
    day.device.synchronise()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        work()
        day.device.synchronise()
    wall = time.perf_counter() - start

    def micros(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    events = sorted(found.key_averages(), key=micros, reverse=True)
    trace = day.paths.out / f"trace-{name}.json.gz"
    found.export_chrome_trace(str(trace))
    if trace.stat().st_size > LARGEST_TRACE:
        trace.unlink()
    return {
        "wall_ms": 1000 * wall,
        "busy_ms": sum(map(micros, events)) / 1000,
        "launches": sum(each.count for each in events if not on_gpu or micros(each)),
        "top": [{"name": e.key[:120], "count": e.count, "ms": micros(e) / 1000} for e in events[:TOP]],
        "trace": trace.name if trace.exists() else None,
    }
