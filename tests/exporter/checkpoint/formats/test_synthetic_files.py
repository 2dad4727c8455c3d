"""Synthetic files in the layouts of other projects are what the importer takes them for, at any size."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.command_line import run, succeeded
from tests.exporter.checkpoint.sources import DENSE, I2V, T2V, State, without
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.checkpoint.checks import Sources, fits_model
from wanforge.exporter.checkpoint.finder.finder import Wanted, find
from wanforge.exporter.checkpoint.formats.opening import layout_name, open_weights
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.checkpoint.record import Arguments
from wanforge.exporter.checkpoint.synthetic.quantised_files import (
    NAMES,
    quantised_paths,
    write_quantised,
    write_sparse,
)
from wanforge.exporter.commands.dry_run import quantises
from wanforge.progress import silent

PARTS = ("vae", "text_encoder", "tokenizer")


@pytest.mark.parametrize("name", [name for name in NAMES if "_k" not in name])
def test_a_file_holds_the_weights_of_the_unquantised_one(
    tmp_path: Path, given: Callable[..., Sources], name: str
) -> None:
    paths = quantised_paths(T2V, name, tmp_path)
    write_quantised(T2V, name, paths, 0, silent)
    found = open_weights(paths["dit"])
    assert layout_name(found) == name
    assert fits_model("dit", found, T2V)
    plain = open_weights(given().weights["dit"])["blocks.1.ffn.2.weight"]
    spelt = "blocks.1.ffn.net.2.weight" if name.startswith("modelopt") else "blocks.1.ffn.2.weight"
    before, after = (torch.cat(list(stored.chunks())).float() for stored in (plain, found[spelt]))
    assert 0 < (after - before).norm() / before.norm() < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_file_can_be_imported(tmp_path: Path, given: Callable[..., Sources], name: str) -> None:
    paths = quantised_paths(T2V, name, tmp_path)
    write_sparse(T2V, name, paths, silent)
    bundle = import_checkpoint(T2V, given(dit=paths["dit"]), tmp_path / "out")
    assert bundle.recipe.attention == "dense"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["comfy-nvfp4", "gguf-q4_k", "lightx2v-int8"])
def test_a_large_sparse_file_takes_no_space(tmp_path: Path, name: str) -> None:
    large = quantised_paths(load_model("turbowan2.1-t2v-1.3b-480p"), name, tmp_path)
    write_sparse(load_model("turbowan2.1-t2v-1.3b-480p"), name, large, silent)
    status = large["dit"].stat()
    assert status.st_size > 400e6
    assert status.st_blocks * 512 < 20e6
    assert fits_model("dit", open_weights(large["dit"]), load_model("turbowan2.1-t2v-1.3b-480p"))


def test_every_expert_has_a_file(tmp_path: Path) -> None:
    succeeded("synth", "--model", I2V.name, "--layout", "gguf-q4_0", "--part", "dit", "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-i2v-high-gguf-q4_0.gguf", "tiny-i2v-low-gguf-q4_0.gguf"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--layout", "gguf-iq4_xs"], "there is no layout 'gguf-iq4_xs'; known: lightx2v-int8, .*, gguf-q6_k"),
        (["--layout", "gguf-q4_k"], "reads gguf-q4_k but does not write it; write a file of zeros with --sparse"),
    ],
)
def test_synth_refuses_layouts_that_it_cannot_write(tmp_path: Path, options: list[str], complaint: str) -> None:
    result = run("synth", "--model", "tiny-t2v", "--out", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert re.search(complaint, result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


def test_synth_writes_over_files_only_when_told(tmp_path: Path) -> None:
    command = ["synth", "--model", "tiny-t2v", "--layout", "fp8-cast", "--part", "dit", "--sparse", "--out", tmp_path]
    succeeded(*command)
    assert "already holds tiny-t2v-fp8-cast.safetensors" in run(*command).stderr
    succeeded(*command, "--replace")


@pytest.mark.slow
def test_the_finder_prefers_quantised_files_unless_told(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]
) -> None:
    """Contents decide, where no name does, and GGUF files are among the files that are looked at."""
    sources = given()
    save_file(without(states["dit"], "proj_l"), tmp_path / "plain.safetensors")
    for name in ("gguf-q8_0", "lightx2v-int8"):
        (path,) = quantised_paths(T2V, name, tmp_path).values()
        write_quantised(T2V, name, {"dit": path}, 0, silent)
        files = {"--vae": sources.weights["vae"], "--text-encoder": sources.weights["text_encoder"]}
        wanted = Wanted(
            out=tmp_path / "out",
            folders=[tmp_path],
            files={**files, "--tokenizer": sources.tokenizer},
            model=T2V,
        )
        found = find(wanted)
        assert found.parts["dit"].path == path
        assert found.parts["dit"].reason.startswith(f"by its contents, {name}; of two kinds the quantised one")
        assert found.recipe.linear == "w8a8-row"
        assert find(replace(wanted, recipe=DENSE)).parts["dit"].path.name == "plain.safetensors"
        path.unlink()


def test_what_an_import_does_is_known_before(tmp_path: Path, given: Callable[..., Sources]) -> None:
    """The time of an import is expected by whether it copies or quantises."""
    for name, recipe, expected in (
        ("lightx2v-int8", "w8a8-row", False),
        ("lightx2v-int8", "fp8-row", True),
        ("lightx2v-int8", "bf16", False),
        ("gguf-q8_0", "w8a8-row", True),
    ):
        paths = quantised_paths(T2V, name, tmp_path)
        write_sparse(T2V, name, paths, silent)
        arguments = Arguments.of(T2V, given(dit=paths["dit"]), None, link=False)
        assert quantises(arguments, load_recipe(recipe)) == expected, (name, recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("lightx2v-int8", "w8a8-row"),
        ("comfy-scaled-fp8", "fp8-row"),
        ("modelopt-nvfp4", "nvfp4"),
        ("gguf-q8_0", "w8a8-row"),
    ],
)
def test_from_a_file_to_a_clip(tmp_path: Path, name: str, recipe: str) -> None:
    succeeded("synth", "--model", "tiny-t2v", "--layout", name, "--out", tmp_path / "in")
    command = ("import", tmp_path / "in", "--model", "tiny-t2v", "--out", tmp_path / "out")
    planned = succeeded(*command, "--dry-run")
    assert f"{name}.{'gguf' if 'gguf' in name else 'safetensors'} ({name}, 20 " in planned.stdout
    made = succeeded(*command)
    assert f"recipe: {recipe} (by the contents of the denoiser)" in made.stderr
    assert f"(by its contents, {name})" in made.stderr
    said = made.stdout.splitlines()[0]
    assert said.startswith(f"dit: {name}, 20 {'converted' if 'gguf' in name else 'weights as they are'}")
    assert said in succeeded("inspect", tmp_path / "out").stdout
    assert Bundle.open(tmp_path / "out").recipe.linear == recipe
    options = ("--backend", "torch", "--prompt", "a red kite", "--frames", 5, "--steps", 1, "--out", tmp_path / "c.mp4")
    succeeded("generate", tmp_path / "out", *options)
    assert (tmp_path / "c.mp4").stat().st_size > 500
