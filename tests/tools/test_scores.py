"""Which measurements of TinyWan are made, and what is written of them."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools.tinywan import scores
from tools.tinywan.scores import STEPS, TOPKS, import_both, measured, write
from wanforge.configs.schema import load_model
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.quality.held_out import Quality, Rates


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int, float | None]]:
    """What was measured, each of which gets a higher rate than the one before."""
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
    found = measured(import_both(model, embedded(model), tmp_path), tell=lambda _: None)
    assert len(asked) == len(set(asked))
    assert asked[:4] == [
        ("torch", "bf16", 4, None),
        ("torch", "bf16-sla", 4, model.topk),
        ("torch", "w8a8", 4, model.topk),
        ("ort", "w8a8", 4, model.topk),
    ]
    over_topk = {("torch", "w8a8", 4, topk) for topk in TOPKS}
    over_steps = {("torch", "w8a8", steps, model.topk) for steps in STEPS}
    assert {asked[2], *asked[4:]} == over_topk | over_steps
    assert found["recipes"][2] in found["topk"]
    assert found["recipes"][2] in found["steps"]

    write(found, tmp_path)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert [len(written[name]) for name in ("recipes", "topk", "steps")] == [4, len(TOPKS), len(STEPS)]
    for name, best in (("topk", "top-k 1: shape 8.0 %"), ("steps", "steps 3: shape 11.0 %")):
        assert best in ElementTree.tostring(ElementTree.parse(tmp_path / f"{name}.svg").getroot(), "unicode")
