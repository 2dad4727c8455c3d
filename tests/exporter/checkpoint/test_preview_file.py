"""Files of preview decoders become an optional part of a bundle, without their encoders."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import checkpoint_sources
from tests.numerics import assert_matches
from tests.preview_files import TINY, preview_decoder, tensors_of_file, write_preview
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.checkpoint.preview.preview_file import read_preview

Import = Callable[[Path], Bundle]


@pytest.fixture
def imported(checkpoints: dict[str, Path], tmp_path: Path) -> Import:
    """Imports tiny-t2v with a preview decoder."""

    def imported(preview: Path) -> Bundle:
        sources = checkpoint_sources("tiny-t2v", checkpoints["tiny-t2v"], quantised=False)
        both = Sources({**sources.weights, "preview": preview}, sources.tokenizer)
        return import_checkpoint(load_model("tiny-t2v"), both, tmp_path / "bundle", recipe=load_recipe("bf16-sla"))

    return imported


@pytest.mark.parametrize("name", ["taew2_1.safetensors", "taew2_1.pth"])
def test_a_file_becomes_a_part_of_the_bundle(name: str, tmp_path: Path, imported: Import) -> None:
    bundle = imported(write_preview(tmp_path / name))
    assert bundle.model.preview == TINY
    assert Bundle.open(bundle.root).model == bundle.model
    found, expected = load_file(bundle.weights("preview")), preview_decoder().state_dict()
    assert found.keys() == expected.keys()
    for tensor, stored in found.items():
        assert_matches(stored, expected[tensor].half().float(), 0, name=tensor)


def test_what_a_file_holds_is_told(tmp_path: Path) -> None:
    found = read_preview(write_preview(tmp_path / "lighttaew2_1.pth"))
    assert (found.config.widths, found.config.latents) == (TINY.widths, "scaled")
    assert found.left_out == ["encoder.0.weight", "encoder.0.bias"]
    assert str(found) == "12, 10, 6, 8 channels, scaled latents; 2 tensors of its encoder left out"


def test_a_decoder_of_other_latents_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of_file(preview_decoder())
    save_file({**tensors, "decoder.1.weight": torch.zeros(12, 48, 3, 3)}, tmp_path / "taew2_2.safetensors")
    with pytest.raises(CheckpointError, match=r"decodes latents of 48 channels to 3, .* give taew2_1"):
        read_preview(tmp_path / "taew2_2.safetensors")


def test_other_files_are_refused(checkpoints: dict[str, Path], tmp_path: Path, imported: Import) -> None:
    vae = checkpoint_sources("tiny-t2v", checkpoints["tiny-t2v"], quantised=False).weights["vae"]
    with pytest.raises(CheckpointError, match=r"is no preview decoder, whose first layer is decoder\.1\.weight"):
        imported(vae)
    tensors = tensors_of_file(preview_decoder())
    del tensors["decoder.4.conv.2.bias"]
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(1\): decoder\.4\.conv\.2\.bias"):
        imported(tmp_path / "broken.safetensors")


def test_a_bundle_without_one_says_nothing_of_it(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    sources = checkpoint_sources("tiny-t2v", checkpoints["tiny-t2v"], quantised=False)
    bundle = import_checkpoint(load_model("tiny-t2v"), sources, tmp_path / "bundle")
    assert not bundle.model.preview
    assert "preview" not in (bundle.root / "manifest.json").read_text()
