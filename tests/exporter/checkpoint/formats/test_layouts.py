"""Every layout of quantised weights is told by its tensors, has the right values, and is kept where it can be."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.exporter.checkpoint.formats.encoders import (
    LAYOUTS,
    Encoder,
    comfy_fp8,
    comfy_nvfp4,
    encoded,
    lightx2v_int8,
    modelopt_nvfp4,
    scaled_fp8,
)
from tests.exporter.checkpoint.sources import T2V, State, spelt, write_safetensors, write_shards
from tests.numerics import assert_matches
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.checkpoint import importer
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.formats import conversion
from wanforge.exporter.checkpoint.formats.four_bits import swizzled, unswizzled
from wanforge.exporter.checkpoint.formats.opening import layout_name, native_linear, open_weights
from wanforge.exporter.checkpoint.formats.quantised_tensor import QuantisedTensor
from wanforge.exporter.checkpoint.importer import import_checkpoint, resume_import
from wanforge.exporter.checkpoint.reader import as_bytes
from wanforge.exporter.checkpoint.record import conversions
from wanforge.plugins.quantiser.reference import quantise_rows, quantise_tiles
from wanforge.plugins.w8a8_linear.reference import w8a8_linear
from wanforge.runtime.reference.quantised_weights import dequantised

EXACT = [name for name, encoder in LAYOUTS.items() if encoder(torch.eye(16)).recipe]
Given = Callable[..., Sources]


def dense(recipe: str) -> Recipe:
    """A recipe with full attention, which is all that files without projections can have."""
    return msgspec.structs.replace(load_recipe(recipe), attention="dense")


def bits(tensor: Tensor) -> bytes:
    return bytes(as_bytes(tensor))


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_are_those_of_the_encoder(tmp_path: Path, name: str) -> None:
    weight = torch.randn(300, 192, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = LAYOUTS[name](weight)
    path = write_safetensors({f"x.{part}": tensor for part, tensor in found.stored.items()}, tmp_path)
    contents = open_weights(path)
    assert list(contents) == ["x.weight"]
    assert (layout_name(contents), native_linear(contents)) == (name.split(" ")[0], found.recipe or "w8a8-row")
    stored = contents["x.weight"]
    assert isinstance(stored, QuantisedTensor)
    for rows in (None, 128, 7):
        values = torch.cat(list(stored.chunks(rows))).view(300, 192)
        assert values.dtype == torch.float32
        if name == "lightx2v-nvfp4":  # the encoder's values are divided by a scale and multiplied by another
            assert_matches(values, found.values, rms=1e-7)
        else:
            assert torch.equal(values, found.values)
    assert (found.values - weight.float()).norm() / weight.float().norm() < 0.11
    for part, tensor in found.parts.items():
        assert b"".join(map(bits, stored.encoding.parts[part]())) == bits(tensor), part


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_numbers_are_kept_by_the_recipe_that_has_them(
    tmp_path: Path, given: Given, states: dict[str, State], name: str
) -> None:
    state, weights = encoded(states["dit"], LAYOUTS[name])
    bundle = import_checkpoint(T2V, given(dit=write_safetensors(state, tmp_path)), tmp_path / "out")
    first = next(iter(weights.values()))
    assert bundle.recipe == dense(first.recipe)
    found = load_file(bundle.weights("dit"))
    for layer, expected in weights.items():
        for part, tensor in expected.parts.items():
            stored = found[f"{layer}.{part}"]
            assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
            assert bits(stored) == bits(tensor)
    for plain in found.keys() & states["dit"].keys():
        assert torch.equal(found[plain], states["dit"][plain])
    said = f"{name.split(' ')[0]}, {len(weights)} weights as they are"
    assert conversions(bundle.root) == {"dit": said}
    assert bundle.manifest.files["weights/dit.safetensors"].source == f"{tmp_path / 'a.safetensors'} ({said})"


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("lightx2v-int8", "w8a8-row"),
        ("comfy-scaled-fp8", "fp8-row"),
        ("modelopt-nvfp4", "nvfp4"),
    ],
)
def test_files_with_projections_get_sparse_attention(
    tmp_path: Path, given: Given, states: dict[str, State], name: str, recipe: str
) -> None:
    state, _ = encoded(states["dit"], LAYOUTS[name])
    projections = {name: tensor for name, tensor in states["dit"].items() if "proj_l" in name}
    bundle = import_checkpoint(T2V, given(dit=write_safetensors(state | projections, tmp_path)), tmp_path / "out")
    assert bundle.recipe == load_recipe(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["prefix", "shards", "respelt"])
@pytest.mark.parametrize("name", ["lightx2v-int8", "comfy-nvfp4", "modelopt-fp8"])
def test_every_form_gives_the_same_bytes(
    tmp_path: Path, given: Given, states: dict[str, State], form: str, name: str
) -> None:
    state, _ = encoded(states["dit"], LAYOUTS[name])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = import_checkpoint(T2V, given(dit=write_safetensors(state, tmp_path / "a")), tmp_path / "expected")
    forms: dict[str, Callable[[], Path]] = {
        "prefix": lambda: write_safetensors(
            {f"model.diffusion_model.{n}": t for n, t in state.items()}, tmp_path / "b"
        ),
        "shards": lambda: write_shards(state, tmp_path / "b"),
        "respelt": lambda: write_safetensors(diffusers(state), tmp_path / "b"),
    }
    found = import_checkpoint(T2V, given(dit=forms[form]()), tmp_path / "out")
    assert found.weights("dit").read_bytes() == expected.weights("dit").read_bytes()


def diffusers(state: State) -> State:
    """The tensors under diffusers' names, with what lies beside weights."""
    new = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".")
        if part in ("weight", "bias", "modulation"):
            new |= spelt("dit", {name: tensor})
        else:
            (weight,) = spelt("dit", {f"{layer}.weight": tensor})
            new[weight.removesuffix("weight") + part] = tensor
    return new


@pytest.mark.slow
def test_comfys_header_says_what_a_layers_text_says(tmp_path: Path, given: Given, states: dict[str, State]) -> None:
    state, weights = encoded(states["dit"], comfy_nvfp4)
    (tmp_path / "a").mkdir()
    expected = import_checkpoint(T2V, given(dit=write_safetensors(state, tmp_path / "a")), tmp_path / "expected")
    layers = ", ".join(f'"{layer}": {{"format": "nvfp4"}}' for layer in weights)
    metadata = {"_quantization_metadata": f'{{"format_version": "1.0", "layers": {{{layers}}}}}'}
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("comfy_quant")}
    for prefix in ("", "model.diffusion_model."):
        path = tmp_path / f"b{prefix}safetensors"
        path = path.with_name("b.safetensors")
        save_file({f"{prefix}{name}": tensor for name, tensor in kept.items()}, path, metadata)
        found = import_checkpoint(T2V, given(dit=path), tmp_path / "out", replace=True)
        assert found.weights("dit").read_bytes() == expected.weights("dit").read_bytes()


def test_marker_of_comfy_is_no_tensor(tmp_path: Path, given: Given, states: dict[str, State]) -> None:
    state, _ = encoded(states["dit"], LAYOUTS["comfy-scaled-fp8"])
    for marker in ("scaled_fp8", "model.diffusion_model.scaled_fp8"):
        prefix = marker.removesuffix("scaled_fp8")
        marked = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        marked[marker] = torch.empty(0, dtype=torch.float8_e4m3fn)
        path = write_safetensors(marked, tmp_path)
        assert import_checkpoint(T2V, given(dit=path), tmp_path / "out", replace=True).recipe.linear == "fp8-row"


@pytest.mark.parametrize(
    ("recipe", "errors"),
    [("w8a8-row", (0.001, 0.02)), ("w8a8", (0.001, 0.02)), ("bf16", (0.0001, 0.003)), ("nvfp4", (0.08, 0.11))],
)
def test_conversion_is_in_float32_and_tells_its_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: Given,
    states: dict[str, State],
    recipe: str,
    errors: tuple[float, float],
) -> None:
    monkeypatch.setattr(importer, "BAND", 128)
    monkeypatch.setattr(conversion, "BAND", 256)
    state, weights = encoded(states["dit"], LAYOUTS["lightx2v-fp8-b128"])
    source = given(dit=write_safetensors(state, tmp_path))
    bundle = import_checkpoint(T2V, source, tmp_path / "out", recipe=load_recipe(recipe))
    found, lost = load_file(bundle.weights("dit")), {}
    for layer, expected in weights.items():
        if recipe == "w8a8-row":
            steps, scale = quantise_rows(expected.values)
            assert torch.equal(found[f"{layer}.int8_weight"], steps)
            assert torch.equal(found[f"{layer}.scale"], scale)
        if recipe == "bf16":
            assert torch.equal(found[f"{layer}.weight"], expected.values.to(torch.bfloat16))
        number = next(n for n in found if n.startswith(f"{layer}.") and n.endswith("weight"))
        new = found[number].float() if recipe == "bf16" else dequantised(found, number)
        lost[layer] = float((new - expected.values).norm() / expected.values.norm())
    said = conversions(bundle.root)["dit"]
    worst = max(lost, key=lambda layer: lost[layer])
    assert said.startswith(f"lightx2v-fp8-b128, {len(weights)} converted with a relative RMS error of ")
    assert said.endswith(f" and {lost[worst]:.3%} at worst, {worst}.weight")
    assert errors[0] < min(lost.values()) <= max(lost.values()) < errors[1]


def test_tiles_are_quantised_from_float32(tmp_path: Path, given: Given, states: dict[str, State]) -> None:
    state, weights = encoded(states["dit"], lightx2v_int8)
    projections = {name: tensor for name, tensor in states["dit"].items() if "proj_l" in name}
    source = given(dit=write_safetensors(state | projections, tmp_path))
    found = load_file(import_checkpoint(T2V, source, tmp_path / "out", recipe=load_recipe("w8a8")).weights("dit"))
    rounding_matters = False
    for layer, expected in weights.items():
        steps, scale = quantise_tiles(expected.values)
        assert torch.equal(found[f"{layer}.int8_weight"], steps)
        assert torch.equal(found[f"{layer}.scale"], scale)
        rounding_matters |= not torch.equal(steps, quantise_tiles(expected.values.to(torch.bfloat16))[0])
    assert rounding_matters


def test_each_weight_is_judged_by_itself(tmp_path: Path, given: Given, states: dict[str, State]) -> None:
    """Some layers are left unquantised, some are in another layout, and layers outside of blocks are quantised too."""
    state, weights = encoded(states["dit"], modelopt_nvfp4)
    for layer, encoder in (("blocks.0.ffn.0", None), ("blocks.1.ffn.2", comfy_fp8), ("text_embedding.0", comfy_fp8)):
        for name in [name for name in state if name.startswith(f"{layer}.") and not name.endswith("bias")]:
            del state[name]
        weight = states["dit"][f"{layer}.weight"]
        added = {"weight": weight} if encoder is None else encoder(weight).stored
        state |= {f"{layer}.{part}": tensor for part, tensor in added.items()}
    bundle = import_checkpoint(T2V, given(dit=write_safetensors(state, tmp_path)), tmp_path / "out")
    assert bundle.recipe == dense("nvfp4")
    found = load_file(bundle.weights("dit"))
    assert torch.equal(found["blocks.0.ffn.2.fp4_weight"], weights["blocks.0.ffn.2"].parts["fp4_weight"])
    expected = scaled_fp8(states["dit"]["text_embedding.0.weight"]).values.to(torch.bfloat16)
    assert torch.equal(found["text_embedding.0.weight"], expected)
    said = conversions(bundle.root)["dit"]
    assert said.startswith("comfy-fp8 and modelopt-nvfp4, 18 weights as they are, 3 converted with")


def test_resumed_import_tells_the_same(tmp_path: Path, given: Given, states: dict[str, State]) -> None:
    state, _ = encoded(states["dit"], lightx2v_int8)
    source = given(dit=write_safetensors(state, tmp_path))
    bundle = import_checkpoint(T2V, source, tmp_path / "out", recipe=load_recipe("bf16"))
    said, content = conversions(bundle.root), bundle.weights("dit").read_bytes()
    bundle.weights("dit").unlink()
    resumed = resume_import(tmp_path / "out")
    assert (conversions(resumed.root), resumed.weights("dit").read_bytes()) == (said, content)


def test_int8_of_minus_128_counts(tmp_path: Path) -> None:
    """LightX2V divides in bfloat16, after which the largest negative value of a row may round to -128."""
    steps = torch.full((16, 128), -128, dtype=torch.int8)
    scale = torch.full((16, 1), 0.5)
    path = write_safetensors({"x.weight": steps, "x.weight_scale": scale}, tmp_path)
    stored = open_weights(path)["x.weight"]
    assert torch.equal(torch.cat(list(stored.chunks())), torch.full((16 * 128,), -64.0))
    x = torch.ones(2, 128)
    assert_matches(w8a8_linear(x, steps, scale[:, 0], torch.zeros(16)), torch.full((2, 16), -64.0 * 128), rms=1e-6)


def test_swizzling_is_undone() -> None:
    scale = torch.arange(256 * 12).view(256, 12)
    assert torch.equal(unswizzled(swizzled(scale)), scale)
    assert not torch.equal(swizzled(scale), scale)


@pytest.mark.parametrize("encoder", [None, lightx2v_int8])
def test_files_of_the_other_networks_may_be_quantised(
    tmp_path: Path, given: Given, states: dict[str, State], bundles: dict[str, Bundle], encoder: Encoder | None
) -> None:
    state = dict(states["text_encoder"])
    if encoder:
        found = encoder(state.pop("blocks.0.attn.q.weight"))
        state |= {f"blocks.0.attn.q.{part}": tensor for part, tensor in found.stored.items()}
    bundle = import_checkpoint(T2V, given(text_encoder=write_safetensors(state, tmp_path)), tmp_path / "out")
    assert set(conversions(bundle.root)) == ({"text_encoder"} if encoder else set())
    assert bundle.recipe == bundles["plain"].recipe
