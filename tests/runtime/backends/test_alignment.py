"""Every backend runs weights wherever they lie in a file, and makes the same clip of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import wanforge
from tests.runtime.memory.test_weights import begin_at
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.tensorfile import read_header
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.export import export

MODEL = load_model("tinywan")


def imported(folder: Path) -> Bundle:
    """TinyWan, quantised: the scales of its feed-forward layers have 24 bytes."""
    return import_checkpoint(MODEL, embedded(MODEL), folder / "imported", recipe=load_recipe("w8a8"))


def linked(folder: Path) -> Bundle:
    """The same weights in linked files whose data begin at an odd byte."""
    made, sources = imported(folder), embedded(MODEL)
    weights = {component: made.weights(component) for component in sources.weights}
    for component in ("dit", "text_encoder"):
        begin_at(weights[component], 1)
        assert min(read_header(weights[component]).offsets.values()) % 16 == 1
    return import_checkpoint(MODEL, Sources(weights, sources.tokenizer), folder / "linked", link=True)


@pytest.mark.slow
@pytest.mark.parametrize("make", [imported, linked])
def test_every_backend_makes_the_same_clip(tmp_path: Path, make: Callable[[Path], Bundle]) -> None:
    bundle = make(tmp_path)
    export(bundle, ["fp32"])
    clips = {
        backend: wanforge.load(bundle.root, backend=backend)
        .generate("a red circle moves left", size=(64, 64), frames=1, steps=1, topk=1.0, seed=0)
        .frames.astype(float)
        for backend in ("torch", "ort", "cuda")
    }
    assert clips["torch"].std() > 1
    for backend in ("ort", "cuda"):
        assert np.abs(clips[backend] - clips["torch"]).mean() < 1, backend
