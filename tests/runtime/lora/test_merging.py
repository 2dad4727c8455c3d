"""Merged weights are the sum in float32, quantised as at an import; from 8-bit weights, changes survive on average."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import checkpoint_sources
from tests.runtime.lora.lora_files import ALPHA, RANK, factors, lora, spelled, targets, write
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle, unquantised, weights_name
from wanforge.errors import BundleError, CheckpointError, RequestError
from wanforge.exporter.checkpoint.importer import run_import
from wanforge.exporter.checkpoint.record import Arguments
from wanforge.plugins.quantiser.reference import dequantise, quantise_tiles
from wanforge.runtime.lora.files import open_lora
from wanforge.runtime.lora.merging import Addition, MergedWeights
from wanforge.runtime.lora.records import read_records
from wanforge.runtime.lora.rounding import generator_of, requantise
from wanforge.runtime.memory.weights import map_tensors
from wanforge.runtime.reference.quantised_weights import quantise_exactly

Imported = Callable[..., Bundle]


@pytest.fixture(scope="module")
def imported(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """Imports a synthetic checkpoint; tests must not change the bundle."""

    def bundle(recipe: str, *, model: str = "tiny-t2v", quantised: bool = False, keep: bool = False) -> Bundle:
        sources = checkpoint_sources(model, checkpoints[model], quantised=quantised)
        out = tmp_path_factory.mktemp("bundle") / "bundle"
        arguments = Arguments.of(load_model(model), sources, load_recipe(recipe), link=False, keep_unquantised=keep)
        return run_import(arguments, out)

    return bundle


def merge(bundle: Bundle, *loras: tuple[Path, float], component: str = "dit") -> dict[str, Tensor]:
    """The merged tensors by name."""
    found = targets(bundle.model.name)
    additions: dict[str, list[Addition]] = {}
    for path, strength in loras:
        for record in read_records(open_lora(path), found):
            additions.setdefault(record.target, []).append(Addition(record, strength))
    merged = MergedWeights(bundle, component, additions)
    outputs = {name: torch.cat([band.reshape(band.shape or 1) for band in bands]) for name, bands in merged.outputs()}
    return {name: tensor.reshape(merged.specs[name].shape) for name, tensor in outputs.items()}


def summed(bundle: Bundle, parts: dict[str, tuple[Tensor, Tensor]], factor: float) -> dict[str, Tensor]:
    """The unquantised weights with what a LoRA adds, by module, computed as whole matrices."""
    name = weights_name(unquantised("dit"))
    name = name if name in bundle.manifest.files else weights_name("dit")
    own = map_tensors(bundle.path(name))
    return {m: own[f"{m}.weight"].float() + (factor * b_NR) @ a_RK for m, (a_RK, b_NR) in parts.items()}


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-row", "w8a8-64", "w8a8-256", "fp8-row", "nvfp4"])
def test_a_merge_is_the_sum_in_float32_quantised(recipe: str, imported: Imported, tmp_path: Path) -> None:
    bundle = imported(recipe, keep=True)
    found = merge(bundle, (lora(tmp_path / "a.safetensors"), 0.7))
    expected = summed(bundle, factors(targets()), 0.7 * ALPHA / RANK)
    names = set()
    for module, weight_NK in expected.items():
        for part, tensor in quantise_exactly(weight_NK, bundle.recipe).items():
            names.add(f"{module}.{part}")
            assert torch.equal(found[f"{module}.{part}"].float(), tensor.float()), f"{module}.{part}"
    assert set(found) == names


def test_a_merge_into_tiles_is_upstreams_quantiser(imported: Imported, tmp_path: Path) -> None:
    bundle = imported("w8a8", keep=True)
    found = merge(bundle, (lora(tmp_path / "a.safetensors"), 1.0))
    for module, weight_NK in summed(bundle, factors(targets()), ALPHA / RANK).items():
        steps, scale = quantise_tiles(weight_NK)
        assert torch.equal(found[f"{module}.int8_weight"], steps)
        assert torch.equal(found[f"{module}.scale"], scale)


def test_a_merge_into_bfloat16_rounds_once(imported: Imported, tmp_path: Path) -> None:
    bundle = imported("bf16-sla")
    found = merge(bundle, (lora(tmp_path / "a.safetensors"), 1.0))
    for module, weight_NK in summed(bundle, factors(targets()), ALPHA / RANK).items():
        assert torch.equal(found[f"{module}.weight"], weight_NK.bfloat16())


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-row", "nvfp4"])
def test_what_is_kept_gives_the_bundles_own_weights(recipe: str, imported: Imported) -> None:
    bundle = imported(recipe, keep=True)
    kept, stored = (bundle.header(weights_name(each)).tensors for each in (unquantised("dit"), "dit"))
    assert len(kept) == 20
    assert not set(kept) & set(stored)
    own = map_tensors(bundle.weights("dit"))
    for name, weight_NK in map_tensors(bundle.path(weights_name(unquantised("dit")))).items():
        for part, tensor in quantise_exactly(weight_NK, bundle.recipe).items():
            assert torch.equal(own[f"{name.removesuffix('.weight')}.{part}"].float(), tensor.float())


def test_two_loras_add_up(imported: Imported, tmp_path: Path) -> None:
    bundle = imported("w8a8", keep=True)
    first, second = factors(targets()), factors(targets(), seed=1)
    joined = {m: (torch.cat((first[m][0], second[m][0])), torch.cat((first[m][1], second[m][1]), 1)) for m in first}
    paths = [write(tmp_path / f"{i}.safetensors", spelled("original", each)) for i, each in enumerate((first, second))]
    both = write(tmp_path / "both.safetensors", spelled("original", joined, alpha=2 * ALPHA))
    found = merge(bundle, (paths[0], 1.0), (paths[1], 1.0))
    expected = merge(bundle, (both, 1.0))
    for name, tensor in expected.items():
        apart = (found[name].float() - tensor.float()).abs().max()
        assert apart <= (1 if name.endswith("int8_weight") else 1e-6 * tensor.abs().max()), name


def test_differences_are_added_in_float32_and_rounded_once(imported: Imported, tmp_path: Path) -> None:
    bundle = imported("w8a8", keep=True)
    stored = map_tensors(bundle.weights("dit"))
    names = {
        "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.1.diff_m": "blocks.1.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    generator = torch.Generator().manual_seed(0)
    added = {key: torch.randn(stored[name].shape, generator=generator) for key, name in names.items()}
    convolution = {"patch_embedding.diff": added["patch_embedding.diff"].reshape(256, 16, 1, 2, 2)}
    table = {"blocks.1.diff_m": added["blocks.1.diff_m"][0]}
    path = write(tmp_path / "a.safetensors", {**added, **convolution, **table})
    found = merge(bundle, (path, 0.5))
    assert set(found) == set(names.values())
    for key, name in names.items():
        assert torch.equal(found[name], (stored[name].float() + 0.5 * added[key]).to(stored[name].dtype)), name


def test_a_whole_difference_of_a_quantised_weight(imported: Imported, tmp_path: Path) -> None:
    bundle = imported("w8a8", keep=True)
    module = "blocks.0.ffn.0"
    added = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    found = merge(bundle, (write(tmp_path / "a.safetensors", {f"{module}.diff": added}), 0.1))
    own = map_tensors(bundle.path(weights_name(unquantised("dit"))))[f"{module}.weight"].float()
    steps, _ = quantise_tiles(own + 0.1 * added)
    assert torch.equal(found[f"{module}.int8_weight"], steps)


@pytest.mark.parametrize("size", [0.002, 0.02])
def test_small_changes_survive_in_8_bit_weights(size: float, imported: Imported, tmp_path: Path) -> None:
    bundle = imported("w8a8", quantised=True)
    stored = map_tensors(bundle.weights("dit"))
    parts = factors(targets(), size=1.0)
    for module, (a_RK, b_NR) in parts.items():
        base = dequantise(stored[f"{module}.int8_weight"], stored[f"{module}.scale"])
        parts[module] = a_RK, b_NR * (size * base.norm() / (ALPHA / RANK * b_NR @ a_RK).norm())
    path = write(tmp_path / "a.safetensors", spelled("original", parts))
    found = merge(bundle, (path, 1.0))
    assert MergedWeights(bundle, "dit", {"blocks.0.self_attn.q.weight": []}).is_rounded
    survived = []
    for module, (a_RK, b_NR) in parts.items():
        base = dequantise(stored[f"{module}.int8_weight"], stored[f"{module}.scale"])
        seen = dequantise(found[f"{module}.int8_weight"], found[f"{module}.scale"]) - base
        added = ALPHA / RANK * b_NR @ a_RK
        survived.append(float((seen * added).sum() / (added * added).sum()))
    assert sum(survived) / len(survived) == pytest.approx(1, abs=0.15 if size < 0.01 else 0.05)
    again = merge(bundle, (path, 1.0))
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())


@pytest.mark.parametrize("rows", [False, True])
def test_nothing_added_changes_no_step(rows: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-128, 128, (128, 384), generator=generator, dtype=torch.int8)
    scale = torch.rand(128 if rows else (1, 3), generator=generator)
    found, kept = requantise(steps, scale, torch.zeros(128, 384), generator_of("x"))
    assert torch.equal(found, steps)
    assert torch.equal(kept, scale)


def test_values_that_outgrow_a_scale_get_a_larger_one() -> None:
    steps, scale = torch.full((128, 128), 127, dtype=torch.int8), torch.ones(1, 1)
    found, grown = requantise(steps, scale, torch.full((128, 128), 127.0), generator_of("x"))
    assert float(grown) == pytest.approx(2.0)
    assert (found.float() * grown).mean() == pytest.approx(254.0, rel=1e-3)


def test_4_bit_weights_alone_are_refused(imported: Imported, tmp_path: Path) -> None:
    bundle = imported("nvfp4")
    with pytest.raises(BundleError, match="--keep-unquantised"):
        merge(bundle, (lora(tmp_path / "a.safetensors"), 1.0))


def test_unquantised_weights_are_kept_only_where_there_are_some(imported: Imported) -> None:
    with pytest.raises(CheckpointError, match="no bfloat16 weights left"):
        imported("w8a8", quantised=True, keep=True)
    with pytest.raises(CheckpointError, match="not quantised by the recipe"):
        imported("bf16-sla", keep=True)


def test_both_experts_keep_theirs(imported: Imported) -> None:
    bundle = imported("w8a8", model="tiny-i2v", keep=True)
    assert {weights_name(unquantised(f"dit.{expert}")) for expert in ("high", "low")} <= bundle.manifest.files.keys()


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-row", "w8a8-64", "w8a8-256"])
def test_a_merge_into_8_bits_is_near_the_sum_whatever_the_tiles(
    recipe: str, imported: Imported, tmp_path: Path
) -> None:
    bundle, exact = imported(recipe), imported(recipe, keep=True)
    found = merge(bundle, (lora(tmp_path / "a.safetensors"), 1.0))
    for module, weight_NK in summed(exact, factors(targets()), ALPHA / RANK).items():
        steps, scale = found[f"{module}.int8_weight"].float(), found[f"{module}.scale"]
        if recipe == "w8a8-row":
            got = steps * scale.reshape(-1, 1)
        else:
            tile, (rows, columns) = bundle.recipe.tile, steps.shape
            got = steps * scale.repeat_interleave(tile, 0)[:rows].repeat_interleave(tile, 1)[:, :columns]
        assert (got - weight_NK).norm() < 0.05 * weight_NK.norm(), module


def test_a_strength_without_bounds_is_refused(imported: Imported, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no finite numbers"):
        merge(imported("bf16-sla"), (lora(tmp_path / "a.safetensors"), 1e300))
