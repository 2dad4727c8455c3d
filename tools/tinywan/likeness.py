"""How far clips are from the ones that prompts ask for: a caption leaves nothing open, so the right clip can be drawn.

Rates say no more once everything is right; this does.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tools.tinywan.scenes import Scene, render, scene_asked
from tools.tinywan.scores import STEPS, Bundles
from wanforge.configs.clip import SPATIAL_STRIDE
from wanforge.configs.model import ModelConfig
from wanforge.runtime.measure.page import Plot, Series, picture_of
from wanforge.runtime.measure.quality.held_out import Prompt, held_out_prompts, rates_of
from wanforge.runtime.measure.quality.meter import Score, read, score
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request

TOPKS = (0.17, 0.34, 0.5, 1.0)
"""One, two, three and all of the six key blocks."""
EVERY = 3
"""Which prompts are taken: no divisor of the number of wordings, so that all of these are."""


@dataclass(frozen=True)
class Point:
    """A measurement.

    Attributes:
        rms: distance from the right clips over all pixels and colours, in values from 0 to 255.
        right: share of things of which everything is right.
    """

    backend: str
    recipe: str
    steps: int
    topk: float | None
    rms: float
    right: float


def drawn_clip(model: ModelConfig, scene: Scene) -> Tensor:
    """The frames in the centre of a scene, float32 from 0 to 255, ``[T, H, W, 3]``; like `latents.centre` on whole
    cells of latents."""
    width, height = frame_wh = model.video.size_wh
    spare = [(extent - frame) // SPATIAL_STRIDE for extent, frame in zip(scene.size_wh, frame_wh, strict=True)]
    x, y = (cells // 2 * SPATIAL_STRIDE for cells in spare)
    return torch.from_numpy(render(scene, model.video.frames)[:, y : y + height, x : x + width])


def judge(pipeline: Pipeline, prompts: Sequence[Prompt], steps: int, topk: float | None) -> Point:
    """Make a clip of every prompt, each with the seed of its place, and hold it against the right one."""
    model, squares, scores = pipeline.model, list[Tensor](), list[Score]()
    for seed, prompt in enumerate(prompts):
        clip = pipeline.make(Request(prompt.text, model.video.clip, seed=seed, steps=steps, topk=topk))
        right_THWC = drawn_clip(model, scene_asked(prompt, model.video.size_wh, model.video.frames))
        squares.append((torch.from_numpy(clip.frames) - right_THWC).square().mean())
        scores += score(read(clip.frames.transpose(0, 3, 1, 2)), prompt.subjects)
    rms = float(torch.stack(squares).mean().sqrt())
    return Point(pipeline.backend.name, pipeline.recipe.name, steps, topk, rms, rates_of(scores).all)


def distances(bundles: Bundles, tell: Callable[[str], None] = print) -> dict[str, list[Point]]:
    """Over recipes and backends at the model's own top-k and steps, and over both of these as shipped."""
    prompts, contenders = held_out_prompts()[::EVERY], bundles.contenders()
    usual, shipped = bundles.plain.model.sampler.steps, contenders[2][0]

    @cache
    def at(pipeline: Pipeline, steps: int, topk: float | None) -> Point:
        point = judge(pipeline, prompts, steps, topk)
        tell(f"{point.backend} {point.recipe}, {steps} steps, top-k {topk}: {point.rms:.2f}, {point.right:.1%} right")
        return point

    return {
        "recipes": [at(pipeline, usual, topk) for pipeline, topk in contenders],
        "grid": [at(shipped, steps, topk) for topk in TOPKS for steps in STEPS],
    }


def write(found: dict[str, list[Point]], out: Path) -> None:
    """The numbers, and a picture of the grid."""
    plain = {name: [asdict(point) for point in points] for name, points in found.items()}
    (out / "grid.json").write_text(json.dumps(plain, indent=1) + "\n")
    plots = {
        "right": grid_plot(found["grid"], "things that come out right", "%", lambda point: 100 * point.right),
        "distance": grid_plot(found["grid"], "distance from the right clips", "RMS, 0 to 255", lambda point: point.rms),
    }
    for name, chart in plots.items():
        (out / f"{name}.svg").write_text(picture_of(chart))


def grid_plot(points: Sequence[Point], title: str, y: str, value: Callable[[Point], float]) -> Plot:
    """A line for each top-k over the steps."""
    series = [
        Series(
            f"top-k {topk}",
            [(p.steps, value(p), f"top-k {topk}, {p.steps} steps: {value(p):.1f}") for p in points if p.topk == topk],
        )
        for topk in dict.fromkeys(point.topk for point in points)
    ]
    return Plot(f"{title}, over steps", "steps", y, series)
