"""Predictions of how time and memory grow with a clip's length and size.

Files that have only headers stand in for the weights of published models. Times are rooflines, from counted
operations and bytes; memory is what the engine builder reports. Nothing is run, and no GPU is needed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from PIL import Image

from wanforge.configs.clip import ClipShape
from wanforge.configs.hub import hub_model
from wanforge.configs.loading import named
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import Target, load_targets
from wanforge.engines.build import EngineOptions, build_engines
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ResourceError, WanforgeError
from wanforge.exporter.export import export
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.plugins.denoiser_block.fused import has_kernels, recipe_for
from wanforge.plugins.tensorrt.library import RTX, Library, flavour_for, open_library
from wanforge.progress import Progress, silent
from wanforge.runtime.backends import create_backend
from wanforge.runtime.measure.cost.launches import LaunchCost
from wanforge.runtime.measure.cost.memory import MemoryReport, memory_report
from wanforge.runtime.measure.cost.stages import StageCost, cost_of, stage_costs
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request
from wanforge.whole_file import temporary_folder

RECIPE = "w8a8"
ENDLESS_GIB = 1e6
"""The memory of an imaginary GPU on which everything stays resident."""
QUADRATIC = ("attention + quantise", "pool q, block scores", "full attention")
"""The launches of a layer whose work grows with the square of the number of tokens."""


@dataclass(frozen=True)
class ScalingPoint:
    """The predicted time of one clip with one model at one top-k.

    Attributes:
        costs: The costs of ``denoise`` (including what its steps share), ``decode`` and, for image-to-video models,
            ``encode``, by GPU.
        quadratic: The share of the denoiser's operations that grows with the square of the number of tokens.
    """

    model: str
    clip: ClipShape
    topk: float
    costs: Mapping[str, Mapping[str, StageCost]]
    quadratic: float


@dataclass(frozen=True)
class ClipMemory:
    """The memory of one clip with one model, for any prompt, any top-k and the most steps.

    Attributes:
        plan: The memory with everything resident; None if no engines could be built.
        refusal: Why no engines could be built.
        plans: The memory on each GPU that engines can be built for here, by the GPU's name.
    """

    model: str
    clip: ClipShape
    plan: MemoryReport | None = None
    refusal: str = ""
    plans: Mapping[str, MemoryReport] = field(default_factory=dict)


@dataclass(frozen=True)
class Scaling:
    """All predictions.

    Attributes:
        own: Models with their own clips, steps and top-k.
        memories: By model and by ascending number of tokens; empty if no engines can be built here.
        missing: Why no engines can be built here.
    """

    targets: Mapping[str, Target]
    points: Sequence[ScalingPoint]
    memories: Sequence[ClipMemory]
    own: Sequence[ScalingPoint] = ()
    missing: str = ""


def predict(
    models: Iterable[ModelConfig],
    clips: Iterable[ClipShape],
    topks: Sequence[float],
    targets: Mapping[str, Target],
    progress: Progress = silent,
) -> Scaling:
    """Predict every clip with every model, W8A8 with SageSLA: the time at each top-k, and the memory for all of them.

    Raises:
        ConfigError: A top-k selects no block of a clip.
    """
    points: list[ScalingPoint] = []
    memories: list[ClipMemory] = []
    missing = ""
    try:
        library = open_library(RTX)
    except ResourceError as error:
        library, missing = None, str(error)
    ordered = sorted(clips, key=lambda clip: clip.tokens)
    for model in models:
        with temporary_folder() as folder:
            bundle = skeleton(folder, model, load_recipe(RECIPE), has_vae=library is not None)
            for clip in ordered:
                points += points_of(bundle, clip, topks, targets)
            if library is not None:
                export(bundle, ["bf16"])
                memories += memories_of(bundle, ordered, targets, library, progress)
    return Scaling(targets, points, memories, own_points(published_models(), targets), missing)


def published_models() -> list[ModelConfig]:
    """The published models that make whole clips."""
    known = [load_model(name) for name in named("models") if hub_model(name) is not None]
    return [model for model in known if not model.causal]


def own_points(models: Iterable[ModelConfig], targets: Mapping[str, Target]) -> list[ScalingPoint]:
    """Predict the time of each model's own clip, with its own number of steps and its own attention."""
    points = []
    for model in models:
        with temporary_folder() as folder:
            bundle = skeleton(folder, model, model.fitted(load_recipe(RECIPE)))
            points += points_of(bundle, model.video.clip, [None], targets)
    return points


def points_of(
    bundle: Bundle, clip: ClipShape, topks: Sequence[float | None], targets: Mapping[str, Target]
) -> list[ScalingPoint]:
    """Predict the time of a clip at each top-k, or at the model's own where that is None."""
    pipeline = Pipeline(bundle, create_backend("torch", bundle))
    runs = {
        name: (recipe_for(bundle.recipe, target.sm), has_kernels(bundle.recipe, target.sm))
        for name, target in targets.items()
    }
    image = Image.new("RGB", (1, 1)) if bundle.model.task == "i2v" else None  # what it shows costs nothing
    points = []
    for topk in topks:
        checked = pipeline.resolve(Request(bundle.model.example_prompt, clip, image, topk=topk))
        stages = {
            (recipe, in_kernels): of_networks(stage_costs(bundle, checked, recipe, in_kernels=in_kernels))
            for recipe, in_kernels in set(runs.values())
        }
        costs = {
            name: {stage: cost_of(costs, target) for stage, costs in stages[runs[name]].items()}
            for name, target in targets.items()
        }
        denoise = next(iter(stages.values()))["denoise"]
        growing = sum(cost.total_flops for cost in denoise if cost.name in QUADRATIC)
        share = growing / sum(cost.total_flops for cost in denoise)
        points.append(ScalingPoint(bundle.model.name, clip, bundle.model.topk if topk is None else topk, costs, share))
    return points


def of_networks(stages: Mapping[str, list[LaunchCost]]) -> dict[str, list[LaunchCost]]:
    """The launches of the denoiser, including what its steps share, of the decoder and, for image-to-video models, of
    the encoder."""
    networks = {"denoise": stages["prepare"] + stages["denoise"], "decode": stages["decode"]}
    return networks | ({"encode": stages["condition"]} if "condition" in stages else {})


def memories_of(
    bundle: Bundle, clips: Sequence[ClipShape], targets: Mapping[str, Target], library: Library, progress: Progress
) -> list[ClipMemory]:
    """Predict the memory of clips, the smallest first.

    Engines are built for each clip until the builder refuses one. Larger clips are not tried, because a refusal can
    corrupt the builder's memory.
    """
    buildable = {name: target for name, target in targets.items() if flavour_for(target.sm) is RTX}
    sms = sorted({target.sm for target in buildable.values()} or {RTX.sms[-1]})
    endless = msgspec.structs.replace(next(iter(load_targets().values())), sm=sms[0], vram_gib=ENDLESS_GIB)
    memories, refusal = list[ClipMemory](), ""
    for done, clip in enumerate(clips, 1):
        name = bundle.model.name
        try:
            if refusal:
                raise ResourceError(refusal)
            build_engines(bundle, library, EngineOptions(clip, tuple(sms)))
        except WanforgeError as error:
            refusal = str(error)
            memories.append(ClipMemory(name, clip, refusal=refusal))
        else:
            plans = {gpu: memory_report(bundle, clip, gpu, target) for gpu, target in buildable.items()}
            memories.append(ClipMemory(name, clip, memory_report(bundle, clip, "endless", endless), plans=plans))
        progress(f"memory of {name}", done, len(clips))
    return memories
