"""Which measurements of TinyWan are made, what they are compared with, and how they are written down."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from xml.etree import ElementTree

import pytest
import torch

from tools.tinywan import scores
from tools.tinywan.latents import centre
from tools.tinywan.likeness import EVERY, Point, drawn_clip, judge
from tools.tinywan.likeness import write as write_grid
from tools.tinywan.scenes import DARKNESS, render, scene_asked
from tools.tinywan.scores import OTHERS, STEPS, TOPKS, import_all, measured, write
from wanforge.configs.model import load_model
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.runtime.measure.quality.held_out import Prompt, Quality, Rates, held_out_prompts, rates_of
from wanforge.runtime.measure.quality.meter import read, score
from wanforge.runtime.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, float | None]]:
    """A list of the points that were measured; each gets a higher rate than the one before."""
    points = []

    def measure(pipeline: Pipeline, *, steps: int, topk: float | None) -> Quality:
        backend, recipe = pipeline.backend.name, pipeline.recipe.name
        points.append((backend, recipe, steps, topk))
        rates = Rates(1, *[len(points) / 100] * 5)
        return Quality(backend, recipe, steps, topk, rates, rates, None)

    monkeypatch.setattr(scores, "measure", measure)
    return points


def test_each_point_is_measured_once_and_drawn(tmp_path: Path, asked: list[tuple[str, str, int, float | None]]) -> None:
    model = load_model("tinywan")
    found = measured(import_all(model, embedded(model), tmp_path), tell=lambda _: None)
    assert len(asked) == len(set(asked))
    assert asked[:8] == [
        ("torch", "bf16", 4, None),
        ("torch", "bf16-sla", 4, model.topk),
        ("torch", "w8a8", 4, model.topk),
        *(("ort", recipe, 4, model.topk) for recipe in ("w8a8", *OTHERS)),
    ]
    over_topk = {("torch", "w8a8", 4, topk) for topk in TOPKS}
    over_steps = {("torch", "w8a8", steps, model.topk) for steps in STEPS}
    assert {asked[2], *asked[8:]} == over_topk | over_steps
    assert found["recipes"][2] in found["topk"]
    assert found["recipes"][2] in found["steps"]

    write(found, tmp_path)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert [len(written[name]) for name in ("recipes", "topk", "steps")] == [8, len(TOPKS), len(STEPS)]
    for name, best in (("topk", "top-k 1: shape 12.0 %"), ("steps", "steps 3: shape 15.0 %")):
        assert best in ElementTree.tostring(ElementTree.parse(tmp_path / f"{name}.svg").getroot(), "unicode")


@pytest.mark.parametrize("prompt", held_out_prompts()[::EVERY], ids=lambda prompt: prompt.text)
def test_the_clip_that_a_prompt_asks_for_is_read_as_that(prompt: Prompt) -> None:
    right = scene_asked(prompt, (128, 112), 21)
    frames = drawn_clip(load_model("tinywan"), right).round().byte()
    assert frames.shape == (21, 112, 128, 3)
    assert rates_of(score(read(frames.permute(0, 3, 1, 2).numpy()), prompt.subjects)).all == 1.0
    assert {thing.size for thing in right.things} == {next((s for s in ("small", "large") if s in prompt.text), "")}
    assert right.background == next((b for b, word in DARKNESS.items() if word in prompt.text), "black")


def test_the_right_clip_is_where_training_shows_it() -> None:
    """Cutting a scene by pixels or by cells of latents gives the same clip, however many cells are to spare."""
    model = load_model("tinywan")
    for prompt in held_out_prompts()[:4]:
        scene = scene_asked(prompt, (128, 112), 21)
        cells = torch.from_numpy(render(scene, 21)).permute(3, 0, 1, 2)[:, :, ::8, ::8]
        assert torch.equal(centre(cells, (14, 16)), drawn_clip(model, scene).permute(3, 0, 1, 2)[:, :, ::8, ::8])


def test_clips_are_held_against_the_right_ones() -> None:
    model, prompts = load_model("tinywan"), held_out_prompts()[:2]
    clips = [drawn_clip(model, scene_asked(prompt, (128, 112), 21)).byte() for prompt in prompts]
    asked = iter(clips)
    pipeline = cast(
        Pipeline,
        SimpleNamespace(
            model=model,
            backend=SimpleNamespace(name="drawn"),
            recipe=SimpleNamespace(name="none"),
            make=lambda request: SimpleNamespace(frames=next(asked).numpy()),
        ),
    )
    # The values of these clips are truncated to whole numbers.
    exact = judge(pipeline, prompts, 3, 0.5)
    assert exact.rms < 0.5
    assert (exact.right, exact.steps, exact.topk, exact.backend) == (1.0, 3, 0.5, "drawn")
    asked = iter([clips[0], 255 - clips[1]])
    wrong = judge(pipeline, prompts, 3, 0.5)
    expected = (255 - 2 * clips[1].float()).square().mean().div(2).sqrt()
    assert wrong.rms == pytest.approx(float(expected), abs=0.5)
    assert wrong.right == 0.5


def test_the_grid_has_a_line_for_each_topk(tmp_path: Path) -> None:
    points = [Point("torch", "w8a8", steps, topk, 9 - steps, topk) for topk in (0.5, 1.0) for steps in (1, 2)]
    write_grid({"recipes": points[:1], "grid": points}, tmp_path)
    assert [point["rms"] for point in json.loads((tmp_path / "grid.json").read_text())["grid"]] == [8, 7, 8, 7]
    right, distance = (ElementTree.parse(tmp_path / f"{name}.svg").getroot() for name in ("right", "distance"))
    for picture, said in ((right, "top-k 0.5, 2 steps: 50.0"), (distance, "top-k 1.0, 1 steps: 8.0")):
        assert said in ElementTree.tostring(picture, "unicode")
