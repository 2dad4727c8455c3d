"""Predictions as lines for a terminal, JSON, and docs/scaling.md with its plots."""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.exporter.studies.scaling import ClipMemory, Scaling, ScalingPoint
from wanforge.runtime.measure.cost.memory import MemoryReport
from wanforge.runtime.measure.page import Plot, Series, picture_of
from wanforge.runtime.measure.tables import markdown_table, number, text_table

COMMAND = "wanforge scaling --markdown docs/scaling.md"
TIME_PLOT, MEMORY_PLOT = "scaling-time.svg", "scaling-memory.svg"
FPS = 16
CLIP = ["size", "seconds", "tokens"]

Table = tuple[list[str], list[list[str]]]


def as_json(scaling: Scaling) -> dict[str, Any]:
    """The predictions as plain values, in bytes and seconds."""
    return {
        "points": [point_facts(point) for point in scaling.points],
        "own": [point_facts(point) for point in scaling.own],
        "memory": [
            {
                "model": memory.model,
                **clip_facts(memory.clip),
                "refusal": memory.refusal,
                "resident": None if memory.plan is None else memory.plan.as_json(),
                "plans": {gpu: plan.as_json() for gpu, plan in memory.plans.items()},
            }
            for memory in scaling.memories
        ],
        "missing": scaling.missing,
    }


def point_facts(point: ScalingPoint) -> dict[str, Any]:
    costs = {gpu: {stage: each.as_json() for stage, each in stages.items()} for gpu, stages in point.costs.items()}
    attention = {"topk": point.topk, "quadratic_share": point.quadratic}
    return {"model": point.model, **clip_facts(point.clip), **attention, "costs": costs}


def label(scaling: Scaling, model: str) -> str:
    """The number of parameters in a model's name, such as ``14B``; the whole name if it has none, or if another model
    has the same number."""
    found = {name: re.search(r"-(a?[\d.]+b)-", name) for name in models(scaling)}
    shorts = {name: name if match is None else match[1].upper() for name, match in found.items()}
    return shorts[model] if [*shorts.values()].count(shorts[model]) == 1 else model


def clip_facts(clip: ClipShape) -> dict[str, int]:
    return {"width_px": clip.width_px, "height_px": clip.height_px, "frames": clip.frames, "tokens": clip.tokens}


def clip_name(clip: ClipShape) -> str:
    return f"{clip.width_px}x{clip.height_px}, {clip.frames} frames"


def clip_cells(clip: ClipShape) -> list[str]:
    return [f"{clip.width_px}x{clip.height_px}", f"{(clip.frames - 1) / FPS:g}", f"{clip.tokens:,}"]


def by_clip(scaling: Scaling) -> Iterator[list[ScalingPoint]]:
    """The points of each model and clip, one for each top-k, ordered by model, size and length."""
    ordered = sorted(scaling.points, key=lambda p: (models(scaling).index(p.model), area(p.clip), p.clip.frames))
    for _, points in groupby(ordered, key=lambda p: (p.model, p.clip)):
        yield list(points)


def models(scaling: Scaling) -> list[str]:
    return list(dict.fromkeys(point.model for point in scaling.points))


def area(clip: ClipShape) -> int:
    return clip.width_px * clip.height_px


def rooflines_table(scaling: Scaling) -> Table:
    """The roofline of all steps of the denoiser on every GPU."""
    rows = []
    for point, *_ in by_clip(scaling):
        rooflines = [number(point.costs[gpu]["denoise"].roofline) for gpu in scaling.targets]
        rows.append([label(scaling, point.model), *clip_cells(point.clip), *rooflines])
    return ["", *CLIP, *scaling.targets], rows


def own_table(scaling: Scaling) -> Table:
    """The roofline of the denoiser of every published model that makes whole clips, for its own clip, on every GPU."""
    rows = []
    for point in scaling.own:
        model = load_model(point.model)
        attention = f"top-k {point.topk:g}" if model.dit.sparse else "full"
        rooflines = [number(point.costs[gpu]["denoise"].roofline) for gpu in scaling.targets]
        size, _, tokens = clip_cells(point.clip)
        facts = [point.model, attention, size, tokens, str(model.sampler.steps), f"{point.quadratic:.0%}"]
        rows.append([*facts, *rooflines])
    return ["", "attention", "size", "tokens", "steps", "quadratic", *scaling.targets], rows


def vae_table(scaling: Scaling, stage: str = "decode") -> Table:
    """The roofline of one half of the VAE, which all models share, on every GPU.

    Args:
        stage: ``decode``, or ``encode``, which only image-to-video models do; without such a model there are no rows.
    """
    having = [points[0] for points in by_clip(scaling) if all(stage in each for each in points[0].costs.values())]
    rows = []
    for point in having:
        if point.model == having[0].model:
            rooflines = [number(point.costs[gpu][stage].roofline) for gpu in scaling.targets]
            rows.append([*clip_cells(point.clip), *rooflines])
    return ["size", *CLIP[1:], *scaling.targets], rows


def growth_table(scaling: Scaling) -> Table:
    """The quadratic share of the operations, the exponent of the time's growth, and the roofline at each top-k."""
    gpu, rows = next(iter(scaling.targets)), []
    before: ScalingPoint | None = None
    for points in by_clip(scaling):
        point = points[0]
        follows = before is not None and (before.model, area(before.clip)) == (point.model, area(point.clip))
        exponent = f"{growth(before, point, gpu):.2f}" if before is not None and follows else "-"
        rooflines = [number(each.costs[gpu]["denoise"].roofline) for each in points]
        rows.append(
            [label(scaling, point.model), *clip_cells(point.clip), f"{point.quadratic:.0%}", exponent, *rooflines]
        )
        before = point
    topks = [f"top-k {point.topk:g}, s" for point in next(by_clip(scaling))]
    return ["", *CLIP, "quadratic", "exponent", *topks], rows


def growth(one: ScalingPoint, other: ScalingPoint, gpu: str) -> float:
    """The power of the number of tokens with which the denoiser's time grows between two clips."""
    times = (point.costs[gpu]["denoise"].roofline for point in (other, one))
    return math.log(next(times) / next(times)) / math.log(other.clip.tokens / one.clip.tokens)


def memory_table(scaling: Scaling) -> Table:
    """The memory that stages need besides weights, the peak with everything resident, and what stays on each GPU."""
    gpus = list(dict.fromkeys(gpu for memory in scaling.memories for gpu in memory.plans))
    rows = []
    for memory in sorted(scaling.memories, key=lambda r: (models(scaling).index(r.model), area(r.clip), r.clip.frames)):
        cells = [label(scaling, memory.model), *clip_cells(memory.clip)]
        if memory.plan is None:
            rows.append([*cells, *["-"] * (3 + len(gpus))])
            continue
        extents = [gigabytes(extent(memory, stage)) for stage in ("denoise", "decode")]
        rows.append([*cells, *extents, gigabytes(peak(memory.plan)), *(resident(memory.plans[gpu]) for gpu in gpus)])
    return ["", *CLIP, "denoiser", "decoder", "peak", *gpus], rows


def extent(memory: ClipMemory, stage: str) -> int:
    """Bytes that a stage needs besides weights."""
    assert memory.plan is not None
    assert memory.plan.plan is not None
    return memory.plan.plan.stages[stage].extent


def peak(plan: MemoryReport) -> int:
    """The most bytes of a GPU's memory that are in use at any time."""
    assert plan.plan is not None
    return plan.fixed_bytes + max(map(plan.plan.peak_bytes, plan.plan.stages))


def resident(plan: MemoryReport) -> str:
    """The weights that stay on a GPU, and the seconds for which a request waits for the others."""
    if plan.plan is None or plan.traffic is None:
        return "too small"
    stays = plan.plan.residency.split(" stay")[0].removeprefix("the ")
    return f"{stays}, {number(plan.traffic.stall_seconds)} s" if plan.traffic.bytes else stays


def gigabytes(count: int) -> str:
    return number(count / 1e9)


def laws(scaling: Scaling) -> list[str]:
    """The law of growth of each model, in sentences with its numbers."""
    found = []
    for model in models(scaling):
        name = label(scaling, model)
        of_model = sorted((p for p in by_clip(scaling) if p[0].model == model), key=lambda p: p[0].clip.tokens)
        halves = [f"{half_point(point):,.0f} at top-k {point.topk:g}" for point in of_model[-1]]
        found.append(
            f"{name}: the number of operations is one constant times the number of tokens plus another times "
            f"its square. The quadratic part makes up half of it at this many tokens: {', '.join(halves)}."
        )
        if len(halves) > 1:
            ratios = ", and ".join(ratio(points, next(iter(scaling.targets))) for points in (of_model[0], of_model[-1]))
            found.append(f"{name}: {ratios}.")
        planned = [memory for memory in scaling.memories if memory.model == model and memory.plan is not None]
        if len(planned) > 1:
            few, many = planned[0], planned[-1]
            slope = (extent(many, "denoise") - extent(few, "denoise")) / (many.clip.tokens - few.clip.tokens)
            found.append(
                f"{name}: the denoiser's memory besides weights grows by {slope / 1e3:.0f} kB per token "
                f"({few.clip.tokens:,} to {many.clip.tokens:,} tokens)."
            )
        refused = [memory for memory in scaling.memories if memory.model == model and memory.plan is None]
        if refused:
            found.append(
                f"{name}: at {refused[0].clip.tokens:,} tokens no engine could be built, so there is no memory "
                f"plan; larger clips were not tried. The builder said: {refused[0].refusal}"
            )
    return found


def ratio(points: Sequence[ScalingPoint], gpu: str) -> str:
    """The time of a clip at its largest top-k compared with its first, in words."""
    most = max(points, key=lambda point: point.topk)
    rooflines = [point.costs[gpu]["denoise"].roofline for point in (most, points[0])]
    return (
        f"at {most.clip.tokens:,} tokens, top-k {most.topk:g} takes {rooflines[0] / rooflines[1]:.1f} times as long as "
        f"top-k {points[0].topk:g}"
    )


def half_point(point: ScalingPoint) -> float:
    """The number of tokens at which half of the denoiser's operations grow with the square of that number."""
    return point.clip.tokens * (1 - point.quadratic) / point.quadratic


def text(scaling: Scaling) -> str:
    """The predictions as text for a terminal."""
    parts = [
        "predicted, not measured: rooflines at the vendors' peaks",
        "denoiser, seconds",
        text_table(*rooflines_table(scaling)),
        "denoisers of all published models with their own clips, seconds",
        text_table(*own_table(scaling)),
        "VAE decoder, seconds",
        text_table(*vae_table(scaling)),
        *(["VAE encoder, seconds", text_table(*encoder)] if (encoder := vae_table(scaling, "encode"))[1] else []),
        "growth",
        text_table(*growth_table(scaling)),
    ]
    if scaling.memories:
        parts += ["memory in GB, predicted", text_table(*memory_table(scaling))]
    return "\n".join([*parts, *laws(scaling), *([f"memory: {scaling.missing}"] if scaling.missing else [])])


def page(scaling: Scaling) -> str:
    """The page docs/scaling.md."""
    gpu = next(iter(scaling.targets.values())).title
    parts = [
        "# How time and memory grow",
        f"Written by `{COMMAND}`, which takes minutes and needs no GPU. Do not edit. **Everything here is predicted, "
        "nothing is measured.** The models' own clips have 77 or 81 frames (five seconds); this page does not say "
        "whether longer clips look right.",
        "Times are rooflines: the time that the operations and bytes of every launch take at the vendor's peaks, with "
        "each tensor counted once, for W8A8 with SageSLA and four steps. Nothing can be faster; "
        "[kernels.md](kernels.md) predicts how much longer the kernels take. The text encoder and the writing of the "
        "video file are left out, because their time hardly grows with the clip's size, if at all.",
        "## The law",
        "\n".join(f"- {law}" for law in laws(scaling)),
        f"![Roofline of the denoiser and of the decoder over tokens, {gpu}]({TIME_PLOT})",
        f"Rooflines of the denoiser on a {gpu}. *Quadratic* is the share of its operations that grows with the "
        "square of the number of tokens, at the first top-k. *Exponent* is the power of the number of tokens with "
        "which its time has grown since the previous length.",
        markdown_table(*growth_table(scaling), words=2),
        "## Denoiser, all steps",
        f"Rooflines in seconds at top-k {scaling.points[0].topk:g}.",
        markdown_table(*rooflines_table(scaling), words=2),
        "## All published models",
        "Rooflines in seconds of all steps of the denoiser, each model that makes whole clips with its own clip, its "
        "own number of steps and its own attention, with W8A8. *Quadratic* is the share of the operations that grows "
        "with the square of the number of tokens.",
        markdown_table(*own_table(scaling), words=3),
        "## VAE decoder",
        "Rooflines in seconds, in bf16; they are the same for all models and almost proportional to the number of "
        "pixels.",
        markdown_table(*vae_table(scaling)),
    ]
    if (encoder := vae_table(scaling, "encode"))[1]:
        parts += ["## VAE encoder", "Rooflines in seconds, for image-to-video models.", markdown_table(*encoder)]
    parts.append("## Memory")
    if scaling.memories:
        parts += [
            "All sizes are in GB. "
            "The memory of intermediate tensors is what TensorRT-RTX's builder reports for every engine; buffers and "
            "weights are counted (`wanforge build --plan`). The table holds for any prompt and top-k. *Denoiser* and "
            "*decoder* are the memory that they need besides weights. *Peak* is the total with every weight resident, "
            "including those of the text encoder, and with a reserve of 1 GB, which is an assumption. The columns of "
            "the GPUs say which weights have a place of their own there, and for how many seconds a request waits for "
            "weights that have none or that were overwritten by a stage. Engines for GPUs that are not in the table "
            "can only be built on those GPUs. The decoder takes four frames at a time, so its memory does not grow "
            "with the length.",
            f"![Memory of the denoiser and of the decoder over tokens]({MEMORY_PLOT})",
            markdown_table(*memory_table(scaling), words=2),
        ]
    if scaling.missing:
        parts.append(f"Left out: {scaling.missing}")
    return "\n\n".join(parts) + "\n"


def time_plot(scaling: Scaling) -> str:
    """The plot of rooflines over tokens on the first GPU, at the first top-k and the last."""
    gpu, found = next(iter(scaling.targets)), list(by_clip(scaling))

    def rooflines(model: str, place: int, stage: str) -> list[tuple[ClipShape, float]]:
        points = (each[place] for each in found if each[0].model == model)
        return [(point.clip, point.costs[gpu][stage].roofline) for point in points]

    places = dict.fromkeys((0, len(found[0]) - 1))
    series = [
        line(f"{label(scaling, model)} {found[0][place].topk:g}", rooflines(model, place, "denoise"), "s")
        for model in models(scaling)
        for place in places
    ]
    series.append(line("decoder", rooflines(models(scaling)[0], 0, "decode"), "s"))
    title = f"rooflines over tokens on {scaling.targets[gpu].title}, by model and top-k"
    return picture_of(
        Plot(title, f"tokens; models by top-k, roofline on {gpu}, predicted", "s", series, log_x=True, log_y=True)
    )


def memory_plot(scaling: Scaling) -> str:
    """The plot of memory besides weights over tokens."""

    def extents(model: str, stage: str) -> list[tuple[ClipShape, float]]:
        planned = (memory for memory in scaling.memories if memory.model == model and memory.plan is not None)
        return [(memory.clip, extent(memory, stage) / 1e9) for memory in planned]

    series = [line(label(scaling, model), extents(model, "denoise"), "GB") for model in models(scaling)]
    series.append(line("decoder", extents(models(scaling)[0], "decode"), "GB", is_joined=False))
    return picture_of(Plot("memory beside weights", "tokens; predicted", "GB", series, log_x=True, log_y=True))


def line(name: str, found: Sequence[tuple[ClipShape, float]], unit: str, *, is_joined: bool = True) -> Series:
    """A line of one value per clip over the clip's tokens."""
    ordered = sorted(found, key=lambda each: each[0].tokens)
    return Series(
        name, [(clip.tokens, y, f"{name}, {clip_name(clip)}: {number(y)} {unit}") for clip, y in ordered], is_joined
    )
