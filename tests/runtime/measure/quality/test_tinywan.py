"""TinyWan as it ships with the package: it is small and draws what prompts ask for, with PyTorch and ONNX Runtime."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from wanforge.cli import cli
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.checkpoint.embedded import FOLDER, embedded
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.export import export
from wanforge.runtime.measure.parity.comparison import Contender
from wanforge.runtime.measure.quality.figures import Subject
from wanforge.runtime.measure.quality.held_out import Prompt, measure

PROMPTS = [
    Prompt("a red circle moving right", (Subject("red", "circle", "right"),)),
    Prompt("a blue square moving left on a white background", (Subject("blue", "square", "left"),)),
    Prompt("a video of a large blue triangle going right at high speed", (Subject("blue", "triangle", "right"),)),
    Prompt("a yellow circle moving down on a grey background", (Subject("yellow", "circle", "down"),)),
]


@pytest.fixture(scope="module")
def tinywan(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model, folder = load_model("tinywan"), tmp_path_factory.mktemp("tinywan")
    bundle = import_checkpoint(model, embedded(model), folder, recipe=load_recipe("w8a8"))
    export(bundle, ("fp32",))
    return Bundle.open(folder)


def test_it_takes_eight_megabytes() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sizes.pop("preview.safetensors") <= 300_000
    assert sum(sizes.values()) <= 8_000_000


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "count"), [("torch", 2), ("ort", 4)])
def test_clips_show_what_the_prompts_say(tinywan: Bundle, backend: str, count: int) -> None:
    rates = measure(Contender(backend).pipeline(tinywan), prompts=PROMPTS[:count]).rates
    assert (rates.colour, rates.shape, rates.direction) == (1.0, 1.0, 1.0)


@pytest.mark.slow
def test_other_prompts_are_not_what_it_shows(tinywan: Bundle) -> None:
    """The same clips are scored against wrong answers, to show that the rates can fall."""
    (subject,) = PROMPTS[0].subjects
    wrong = [
        Prompt(PROMPTS[0].text, (replace(subject, **{name: value}),))
        for name, value in (("colour", "blue"), ("shape", "triangle"), ("direction", "left"))
    ]
    rates = measure(Contender("ort").pipeline(tinywan), prompts=wrong).rates
    assert (rates.colour, rates.shape, rates.direction) == pytest.approx((2 / 3, 2 / 3, 2 / 3))


@pytest.mark.slow
def test_a_sweep_counts_what_comes_out_right(tinywan: Bundle, tmp_path: Path) -> None:
    """A single step sees nothing but noise, so its clip is at best as good as that of four steps."""
    page = tmp_path / "sweep.html"
    options = ("--sweep", "steps=1,4", "--rates", "1", "--repeats", "1", "--backend", "ort", "--html", str(page))
    done = CliRunner().invoke(cli, ["bench", str(tinywan.root), *options, "--json"])
    assert done.exit_code == 0, done.output
    one, four = (point["rates"] for point in json.loads(done.stdout)["sweeps"][0]["points"])
    assert one["subjects"] == four["subjects"] == 1
    assert one["all"] <= four["all"] == 1.0
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "steps 4: shape 100.0 %" in text
