"""Fixtures for the importer's tests: tiny-t2v's tensors, its files, and the bundles imported from them."""

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import checkpoint_sources
from tests.exporter.checkpoint.sources import T2V, State
from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint


@pytest.fixture(scope="session")
def states(checkpoints: dict[str, Path]) -> dict[str, State]:
    """The tensors of tiny-t2v's files. Tests must not change them."""
    files = {
        "dit": "tiny-t2v.pth",
        "dit-quant": "tiny-t2v-quant.pth",
        "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    }
    folder = checkpoints["tiny-t2v"]
    return {part: torch.load(folder / file, weights_only=True) for part, file in files.items()}


@pytest.fixture(scope="session")
def given(checkpoints: dict[str, Path]) -> Callable[..., Sources]:
    """A function that returns a model's synthetic files, some replaced by other paths (``dit_low`` for ``dit.low``)."""

    def sources(model: ModelConfig = T2V, *, quantised: bool = False, **others: Path) -> Sources:
        original = checkpoint_sources(model.name, checkpoints[model.name], quantised=quantised)
        tokenizer = others.pop("tokenizer", original.tokenizer)
        replaced = {component.replace("_low", ".low").replace("_high", ".high"): p for component, p in others.items()}
        return Sources({**original.weights, **replaced}, tokenizer)

    return sources


@pytest.fixture(scope="session")
def bundles(given: Callable[..., Sources], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Bundles imported from tiny-t2v's own files: ``plain`` and ``quant``. Tests must not change them."""
    folder = tmp_path_factory.mktemp("imported")
    return {
        "plain": import_checkpoint(T2V, given(), folder / "plain"),
        "quant": import_checkpoint(T2V, given(quantised=True), folder / "quant"),
    }


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """A function that makes writes beyond a size really fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
