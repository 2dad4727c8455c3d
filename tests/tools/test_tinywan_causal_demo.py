"""The demo of streams: it passes where the stream follows its prompts, and finds what does not."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tools.tinywan.causal.demo import SCRIPT, Segment, main, subject_of
from tools.tinywan.causal.walks import Leg, Walk, render
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.runtime.measure.quality.figures import Subject
from wanforge.runtime.pipeline import open_pipeline

MODEL = load_model("tinywan-causal")


def test_the_script_asks_for_what_the_meter_can_read() -> None:
    assert subject_of("a yellow triangle moving left quickly") == Subject("yellow", "triangle", "left", "quickly")
    assert all(subject_of(prompt).shape in prompt for prompt in SCRIPT.values())


@pytest.mark.parametrize(
    ("prompt", "faults"),
    [
        ("a red circle moving right", []),
        ("a blue circle moving right", ["colour"]),
        ("a red square moving right", ["shape"]),
        ("a red circle moving up", ["direction"]),
        ("a red circle moving right quickly", ["speed"]),
    ],
)
def test_what_a_segment_does_not_show_is_found(prompt: str, faults: list[str]) -> None:
    walk = Walk((Leg(Subject("red", "circle", "right"), "", "black"),), (0,), (100.0, 50.0), is_new=False)
    frames = render(walk, MODEL.video.size_wh, 16).round().astype(np.uint8)
    assert Segment(prompt, frames).faults == faults


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("causal") / "bundle"
    return import_checkpoint(MODEL, embedded(MODEL), folder, recipe=load_recipe("w8a8"))


@pytest.mark.slow
def test_each_prompt_is_shown_in_its_time(bundle: Bundle) -> None:
    prompts = ["a red circle moving right", "a blue square moving down"]
    shown = list(open_pipeline(bundle, "torch").stream(" | ".join(f"{each}[1.5s]" for each in prompts), seed=0))
    for prompt in prompts:
        frames = np.concatenate([chunk.frames for chunk in shown if chunk.prompt == prompt])
        assert Segment(prompt, frames).faults == [], prompt


@pytest.mark.slow
def test_a_stream_turns_when_it_is_told(bundle: Bundle, tmp_path: Path) -> None:
    picture = tmp_path / "stream.png"
    arguments = [str(bundle.root), "--out", str(tmp_path / "stream.mp4"), "--picture", str(picture)]
    found = CliRunner().invoke(main, arguments)
    # Which chunk a prompt meets depends on how busy the machine is, so not every segment is held to be right here.
    assert "'a red circle moving right': right" in found.output, found.output
    assert "of 'a blue square moving down': " in found.output
    assert picture.exists()
