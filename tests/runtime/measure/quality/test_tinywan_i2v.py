"""TinyWan's image-to-video model as it ships: small, true to the image, and moving as the prompt says."""

from pathlib import Path

import numpy as np
import pytest

from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.embedded import FOLDER, embedded
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.runtime.continuation.chain import Seams, continued
from wanforge.runtime.measure.parity.comparison import Contender
from wanforge.runtime.measure.quality.figures import Subject
from wanforge.runtime.measure.quality.held_out import Prompt, measure
from wanforge.runtime.measure.quality.meter import read
from wanforge.runtime.measure.quality.shots import Shot, still
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request

MODEL = load_model("tinywan-i2v")
SIZE = MODEL.video.size_wh
SUBJECT = Subject("blue", "circle", "right")
IMAGES = {place: still(Shot(SUBJECT, 22, 18.0, place), SIZE) for place in ((30.0, 30.0), (30.0, 80.0))}
"""The same circle at the top and at the bottom."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    bundle = import_checkpoint(MODEL, embedded(MODEL), tmp_path_factory.mktemp("tinywan-i2v"))
    assert bundle.recipe.name == "w8a8"
    return Contender("torch").pipeline(Bundle.open(bundle.root))


def test_its_experts_take_eight_megabytes_and_all_else_is_shared() -> None:
    sources = embedded(MODEL)
    added = [path for path in sources.weights.values() if path.parent != FOLDER]
    assert sorted(path.name for path in added) == ["dit.high.safetensors", "dit.low.safetensors"]
    assert sum(path.stat().st_size for path in added[0].parent.iterdir()) <= 8_000_000
    assert sources.tokenizer.parent == FOLDER


def test_recipes_without_quantisation_need_other_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="needs the unquantised file"):
        import_checkpoint(MODEL, embedded(MODEL), tmp_path / "out", recipe=load_recipe("bf16-sla"))


@pytest.mark.slow
def test_a_clip_begins_with_the_image_and_moves_as_the_prompt_says(pipeline: Pipeline) -> None:
    """The caption names neither colour nor shape, so both come from the image."""
    prompts = [Prompt("moving right", (SUBJECT,), image) for image in IMAGES.values()]
    found = measure(pipeline, prompts=prompts)
    assert (found.rates.colour, found.rates.shape, found.rates.direction) == (1.0, 1.0, 1.0)
    assert found.first_frame_db is not None
    assert found.first_frame_db > 28
    swapped = [Prompt("moving right", (SUBJECT,), image) for image in reversed(list(IMAGES.values()))]
    wrong = np.square(np.asarray(swapped[0].image, np.float64) - np.asarray(prompts[0].image)).mean()
    assert found.first_frame_db - 10 * np.log10(255**2 / wrong) > 10


@pytest.mark.slow
def test_a_clip_goes_on_from_its_last_frame(pipeline: Pipeline) -> None:
    image, shape = IMAGES[30.0, 30.0], MODEL.video.clip
    requests = [Request("moving right", shape), Request("moving down", shape, seed=1)]
    seams = Seams()
    _, second = (list(seams.watch(part)) for part in continued(pipeline, requests, image))
    (seam,) = seams.found()
    assert seam.across < 3 * seam.inside
    (thing,) = read(np.stack(second).transpose(0, 3, 1, 2)).things
    assert (thing.colour, thing.direction) == ("blue", "down")
