"""How far clips are from the ones that prompts ask for: a caption describes exactly one clip, which can be drawn.

Once everything is right, the rates no longer show a difference; these distances still do.
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
"""The shares that select one, two, three and all of the six key blocks."""
EVERY = 3
"""Every third prompt is used; three does not divide the number of wordings, so that all wordings occur."""


@dataclass(frozen=True)
class Point:
    """The measurement of one configuration.

    Attributes:
        rms: Distance from the right clips over all pixels and colours, in values from 0 to 255.
        right: Share of things for which everything is right.
    """

    backend: str
    recipe: str
    steps: int
    topk: float | None
    rms: float
    right: float


def drawn_clip(model: ModelConfig, scene: Scene) -> Tensor:
    """The centre of a scene, cut to the size of a frame, float32 from 0 to 255, ``[T, H, W, 3]``; like
    `latents.centre`, it lies on whole latent cells."""
    width, height = frame_wh = model.video.size_wh
    spare = [(extent - frame) // SPATIAL_STRIDE for extent, frame in zip(scene.size_wh, frame_wh, strict=True)]
    x, y = (cells // 2 * SPATIAL_STRIDE for cells in spare)
    return torch.from_numpy(render(scene, model.video.frames)[:, y : y + height, x : x + width])


def judge(pipeline: Pipeline, prompts: Sequence[Prompt], steps: int, topk: float | None) -> Point:
    """Make a clip of every prompt, with its index as the seed, and compare it with the right clip."""
    model, squares, scores = pipeline.model, list[Tensor](), list[Score]()
    for seed, prompt in enumerate(prompts):
        clip = pipeline.make(Request(prompt.text, model.video.clip, seed=seed, steps=steps, topk=topk))
        right_THWC = drawn_clip(model, scene_asked(prompt, model.video.size_wh, model.video.frames))
        squares.append((torch.from_numpy(clip.frames) - right_THWC).square().mean())
        scores += score(read(clip.frames.transpose(0, 3, 1, 2)), prompt.subjects)
    rms = float(torch.stack(squares).mean().sqrt())
    return Point(pipeline.backend.name, pipeline.recipe.name, steps, topk, rms, rates_of(scores).all)


def distances(bundles: Bundles, tell: Callable[[str], None] = print) -> dict[str, list[Point]]:
    """Measure recipes and backends at the model's own top-k and steps, and the shipped recipe over both of these."""
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
    """Write the numbers, and plots of the grid."""
    plain = {name: [asdict(point) for point in points] for name, points in found.items()}
    (out / "grid.json").write_text(json.dumps(plain, indent=1) + "\n")
    plots = {
        "right": grid_plot(found["grid"], "things that come out right", "%", lambda point: 100 * point.right),
        "distance": grid_plot(found["grid"], "distance from the right clips", "RMS, 0 to 255", lambda point: point.rms),
    }
    for name, chart in plots.items():
        (out / f"{name}.svg").write_text(picture_of(chart))


def grid_plot(points: Sequence[Point], title: str, y: str, value: Callable[[Point], float]) -> Plot:
    """A plot over the steps, with a line for each top-k."""
    series = [
        Series(
            f"top-k {topk}",
            [(p.steps, value(p), f"top-k {topk}, {p.steps} steps: {value(p):.1f}") for p in points if p.topk == topk],
        )
        for topk in dict.fromkeys(point.topk for point in points)
    ]
    return Plot(f"{title}, over steps", "steps", y, series)
