"""What `wanforge build` and `wanforge generate` would do and take."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from wanforge.configs.targets import architecture_name
from wanforge.engines.build import (
    EngineOptions,
    PendingEngine,
    check_formats,
    check_gpu,
    graphs_to_build,
    is_needed,
    pending_engine,
)
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import WanforgeError
from wanforge.plugins.tensorrt.library import Flavour, Library, open_library
from wanforge.runtime.measure.cost.shares import stage_shares
from wanforge.runtime.measure.durations import Work, remember
from wanforge.runtime.measure.estimates import Estimate
from wanforge.runtime.memory.estimate import needed_bytes
from wanforge.runtime.output.video import most_bytes
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import CheckedRequest, Timings

ENGINE_BYTES = 8_000_000
"""More than the bytes of an engine without its constants; a block has about 2 MB, see docs/log.md, 2026-11-21."""


def estimate_build(bundle: Bundle, groups: Sequence[tuple[Flavour, EngineOptions]]) -> Estimate:
    """The estimate of a build, after the same checks as before the build itself.

    Args:
        groups: The engines that are asked for, with the flavour of TensorRT that builds them.
    """
    steps, works, disk, memory, failures = list[str](), list[Work](), 0, 0, list[str]()
    for flavour, options in groups:
        names = ", ".join(map(architecture_name, options.sms))
        try:
            check_formats(bundle.recipe, options.sms)
            library, needed = needed_engines(bundle, flavour, options)
        except WanforgeError as error:
            failures.append(f"{names}: {error}")
            continue
        steps.append(f"would build {len(needed)} engines for {names} with {library}:")
        steps += [f"  {pending.name}" for pending in needed]
        works += [build_work(bundle, flavour, options, len(needed))] if needed else []
        disk += sum(ENGINE_BYTES + pending.job.constant_bytes for pending in needed)
        memory = max([memory, *(pending.job.needed_bytes for pending in needed)])
    return Estimate(steps, works, disk, bundle.root, memory, failures)


def needed_engines(bundle: Bundle, flavour: Flavour, options: EngineOptions) -> tuple[Library, list[PendingEngine]]:
    """The library that would build the engines of some architectures, and those that it would build.

    Raises:
        WanforgeError: It cannot build for them on this machine, or a graph is missing or stale.
    """
    library = open_library(flavour)
    check_gpu(flavour, options.sms)
    graphs = graphs_to_build(bundle, options.only, options.side_rank, block_plugin=options.block_plugin)
    pending = [pending_engine(bundle, library, options, onnx, graph) for onnx, graph in graphs.items()]
    return library, [each for each in pending if is_needed(bundle, options, each)]


def build_work(bundle: Bundle, flavour: Flavour, options: EngineOptions, engines: int) -> Work:
    """The work of building this many engines."""
    what = f"{bundle.model.name} {bundle.recipe.name} for {len(options.sms)} architectures"
    return Work(f"build {flavour.name} {what}", engines)


def estimate_generate(pipeline: Pipeline, requests: Sequence[CheckedRequest], places: Sequence[Path]) -> Estimate:
    """The estimate of making videos, after the same checks as before making them."""
    steps, disk, memory = [f"would make {len(requests)} videos with the backend {pipeline.backend.name}:"], 0, 0
    amounts = defaultdict[str, float](float)
    for checked, place in zip(requests, places, strict=True):
        shape = checked.request.shape
        steps.append(f"  {place}: {shape}, {len(checked.steps)} steps, seed {checked.request.seed}")
        disk += most_bytes(shape.width_px, shape.height_px, shape.frames)
        itemsize = pipeline.backend.dtype.itemsize
        memory = max(memory, needed_bytes(pipeline.model, pipeline.recipe, shape, itemsize))
        for work in generate_works(pipeline, checked):
            amounts[work.kind] += work.amount
    works = [Work(kind, amount) for kind, amount in amounts.items()]
    return Estimate(steps, works, disk, places[0].parent, memory)


def generate_works(pipeline: Pipeline, checked: CheckedRequest) -> list[Work]:
    """The work of a request: the steps, decoding and writing, and everything before."""
    shares = stage_shares(pipeline.model, pipeline.recipe, checked)
    denoise = sum(amount for stage, amount in shares.items() if stage.startswith(("step ", "chunk")))
    rest = sum(shares.values()) - denoise - shares["decode"]
    what = f"generate {pipeline.backend.name} {pipeline.model.name} {pipeline.recipe.name}"
    return [Work(f"{what} denoise", denoise), Work(f"{what} decode", shares["decode"]), Work(f"{what} prepare", rest)]


def remember_stages(pipeline: Pipeline, checked: CheckedRequest, timings: Timings) -> None:
    """Note how long the stages of a request took on one GPU or processor, which is what estimates are made for."""
    if pipeline.backend.exchange.ranks > 1:
        return
    stages = timings.stages
    written = sum(stages[stage] for stage in ("decode", "transfer", "write"))
    seconds = [stages["denoise"], written, timings.total - stages["denoise"] - written]
    for work, each in zip(generate_works(pipeline, checked), seconds, strict=True):
        remember(work, each)
