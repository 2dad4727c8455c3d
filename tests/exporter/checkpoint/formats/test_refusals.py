"""Quantised weights that are damaged, incomplete or in layouts that are not imported are refused with a reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.exporter.checkpoint.formats.encoders import E4M3, LAYOUTS, encoded, note
from tests.exporter.checkpoint.sources import BY_ROW, I2V, T2V, State, assert_refused, write_safetensors
from wanforge.configs.recipe import load_recipe
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint

LAYER = "blocks.1.ffn.0"
Change = Callable[[Tensor], Tensor]


def like(value: float) -> Change:
    return lambda tensor: torch.full_like(tensor, value)


def first(value: float) -> Change:
    """Set the first number."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone().float()
        changed.view(-1)[0] = value
        return changed.to(tensor.dtype)

    return change


def said(**what: object) -> Change:
    return lambda tensor: note(**what)


NO_SCALE = "scales from .* but scales are positive"
CHANGES: dict[str, tuple[str, str, Change | None, str]] = {
    "int8-without-scale": ("lightx2v-int8", "weight_scale", None, rf"{LAYER} has no scale \(weight_scale\)"),
    "fp8-without-scale": ("lightx2v-fp8", "weight_scale", None, f"the scales of {LAYER} are missing"),
    "comfy-without-scale": ("comfy-scaled-fp8", "scale_weight", None, f"the scales of {LAYER} are missing"),
    "noted-without-scale": ("comfy-int8", "weight_scale", None, "has no scale"),
    "nvfp4-without-scale": ("modelopt-nvfp4", "weight_scale", None, "is packed in bytes, but lacks weight_scale and"),
    "nvfp4-without-global-scale": ("comfy-nvfp4", "weight_scale_2", None, "is packed in bytes, but lacks"),
    "zero-scale": ("lightx2v-int8", "weight_scale", first(0), NO_SCALE),
    "negative-scale": ("lightx2v-int8", "weight_scale", first(-0.1), NO_SCALE),
    "nan-scale": ("lightx2v-int8", "weight_scale", first(torch.nan), "of blocks.1.ffn.0.weight_scale are NaN"),
    "infinite-scale": ("modelopt-fp8", "weight_scale", like(torch.inf), "are NaN, infinite or too large"),
    "large-scale": ("modelopt-fp8", "weight_scale", like(1e37), "448 finite in bfloat16"),
    "zero-global-scale": ("modelopt-nvfp4", "weight_scale_2", like(0), NO_SCALE),
    "tiny-inverse": ("lightx2v-nvfp4", "weight_global_scale", like(1e-40), "whose inverse is too large"),
    "scales-of-columns": ("lightx2v-int8", "weight_scale", lambda t: t.T.contiguous(), "one float, one per row$"),
    "scales-of-half": ("lightx2v-fp8", "weight_scale", lambda t: t[:100], "one per row or one per tile of 128x128"),
    "int8-in-tiles": ("lightx2v-int8", "weight_scale", lambda t: t[:8].view(4, 2), "one float, one per row$"),
    "scales-of-integers": ("lightx2v-int8", "weight_scale", lambda t: t.int() + 1, r"with scales I32 \[512, 1\]"),
    "empty-scale": ("modelopt-fp8", "weight_scale", lambda t: torch.empty(0), r"with scales F32 \[0\]"),
    "weight-of-three": ("lightx2v-int8", "weight", lambda t: t[None], "only matrices are quantised"),
    "empty-weight": ("lightx2v-int8", "weight", lambda t: t[:0], "only matrices are quantised"),
    "other-size": ("lightx2v-int8", "weight", lambda t: t[:, :128].contiguous(), r"is F32 \[512, 128\], expected"),
    "bytes": ("lightx2v-int8", "weight", lambda t: t.view(torch.uint8), "is packed in bytes, but lacks"),
    "nan-weight": ("lightx2v-fp8", "weight", first(torch.nan), "holds 8-bit floats that are NaN or infinite"),
    "infinite-weight": ("fp8-cast of e5m2", "weight", first(torch.inf), "8-bit floats that are NaN or infinite"),
    "nan-block": ("modelopt-nvfp4", "weight_scale", first(torch.nan), "holds scales that are negative or NaN"),
    "negative-block": ("comfy-nvfp4", "weight_scale", first(-1), "holds scales that are negative or NaN"),
    "linear-blocks": ("comfy-nvfp4", "weight_scale", lambda t: t[:, :8].contiguous(), r"expected F8_E4M3 \[512, 16\]"),
    "block-scales-in-float": ("modelopt-nvfp4", "weight_scale", lambda t: t.float(), "expected F8_E4M3"),
    "many-global-scales": ("modelopt-nvfp4", "weight_scale_2", lambda t: t.repeat(3), "and one F32, and rows"),
    "not-a-row-of-blocks": ("modelopt-nvfp4", "weight", lambda t: t[:, :33].contiguous(), "a multiple of 8 bytes"),
    "mxfp8": ("comfy-fp8", "comfy_quant", said(format="mxfp8"), "has ComfyUI's format 'mxfp8', which is not imported"),
    "rotated": (
        "comfy-int8",
        "comfy_quant",
        said(format="int8_tensorwise", convrot=True),
        r"rotated weights \(con",
    ),
    "format-of-other-type": ("comfy-int8", "comfy_quant", said(format="nvfp4"), "but its format is said to be nvfp4"),
    "long-note": ("comfy-fp8", "comfy_quant", said(format="x" * 5000), "is no short text"),
    "no-json": ("comfy-fp8", "comfy_quant", lambda t: t[:-3], "comfy_quant makes no sense"),
    "deep-json": ("comfy-fp8", "comfy_quant", lambda t: torch.full((4000,), 91, dtype=torch.uint8), "makes no sense"),
    "list": ("comfy-fp8", "comfy_quant", lambda t: torch.tensor([91, 93], dtype=torch.uint8), "makes no sense"),
    "no-bytes": ("comfy-fp8", "comfy_quant", lambda t: t.float(), "makes no sense"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_damaged_weights_are_refused(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State], name: str
) -> None:
    layout, part, change, complaint = CHANGES[name]
    state, _ = encoded(states["dit"], LAYOUTS[layout])
    tensor = state.pop(f"{LAYER}.{part}")
    if change is not None:
        state[f"{LAYER}.{part}"] = change(tensor)
    path = write_safetensors(state, tmp_path)
    if name in ("nan-weight", "infinite-weight", "nan-block", "negative-block"):  # found when they are read
        with pytest.raises(CheckpointError, match=complaint):
            import_checkpoint(T2V, given(dit=path), tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()
        return
    assert_refused(tmp_path / "out", T2V, given(dit=path), complaint)


ADDED: dict[str, tuple[str, State, str]] = {
    "smoothed": ("modelopt-nvfp4", {"pre_quant_scale": torch.ones(256)}, "has pre_quant_scale beside its weight"),
    "svdquant": ("modelopt-nvfp4", {"svdquant_lora_a": torch.ones(4, 256)}, "has svdquant_lora_a beside its weight"),
    "two-scales": ("lightx2v-fp8", {"scale_weight": torch.ones(1)}, "has several scales: weight_scale, scale_weight"),
    "both-global-scales": ("modelopt-nvfp4", {"weight_global_scale": torch.ones(1)}, "lacks weight_scale and one of"),
    "unknown": ("lightx2v-int8", {"zero_point": torch.ones(1)}, rf"unexpected \(1\): {LAYER}\.zero_point"),
    "nunchaku": ("lightx2v-int8", {"qweight": torch.ones(2)}, "in the layout of nunchaku, which is not imported"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADDED)
def test_more_than_numbers_and_scales_is_refused(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State], name: str
) -> None:
    layout, added, complaint = ADDED[name]
    state, _ = encoded(states["dit"], LAYOUTS[layout])
    path = write_safetensors(state | {f"{LAYER}.{part}": tensor for part, tensor in added.items()}, tmp_path)
    assert_refused(tmp_path / "out", T2V, given(dit=path), complaint)


@pytest.mark.parametrize("said", ["no json", "[]", '{"layers": 3}', '{"layers": {"x": []}}', "[" * 100_000])
def test_headers_that_make_no_sense_are_refused(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State], said: str
) -> None:
    state, _ = encoded(states["dit"], LAYOUTS["modelopt-fp8"])
    save_file(state, tmp_path / "a.safetensors", {"_quantization_metadata": said})
    complaint = "_quantization_metadata in its header makes no sense"
    assert_refused(tmp_path / "out", T2V, given(dit=tmp_path / "a.safetensors"), complaint)


def test_without_a_weight_scales_are_unexpected(
    tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]
) -> None:
    state, _ = encoded(states["dit"], LAYOUTS["lightx2v-int8"])
    state[f"{LAYER}.weight"] = states["dit"][f"{LAYER}.weight"]
    path = write_safetensors(state, tmp_path)
    assert_refused(tmp_path / "out", T2V, given(dit=path), rf"unexpected \(1\): {LAYER}\.weight_scale$")


@pytest.mark.slow
def test_overflow_of_blocks_is_found(tmp_path: Path, given: Callable[..., Sources], states: dict[str, State]) -> None:
    """Each scale is a number, but their product with the numbers is none."""
    state, _ = encoded(states["dit"], LAYOUTS["lightx2v-nvfp4"])
    state[f"{LAYER}.weight_global_scale"] = torch.tensor(1e-38)
    state[f"{LAYER}.weight_scale"] = torch.full_like(state[f"{LAYER}.weight_scale"].float(), 448).to(E4M3)
    path = write_safetensors(state, tmp_path)
    with pytest.raises(CheckpointError, match=f"{LAYER}.weight holds values that are NaN, infinite or too large"):
        import_checkpoint(T2V, given(dit=path), tmp_path / "out", recipe=load_recipe("bf16"))


def test_experts_in_different_layouts_need_a_recipe(
    tmp_path: Path, given: Callable[..., Sources], checkpoints: dict[str, Path]
) -> None:
    paths = {}
    for expert, layout in (("high", "lightx2v-int8"), ("low", "lightx2v-fp8")):
        plain = torch.load(given(I2V).weights[f"dit.{expert}"], weights_only=True)
        (tmp_path / expert).mkdir()
        paths[f"dit_{expert}"] = write_safetensors(encoded(plain, LAYOUTS[layout])[0], tmp_path / expert)
    complaint = "do not match: .* has lightx2v-int8 weights, .* has lightx2v-fp8 weights; choose one recipe for both"
    assert_refused(tmp_path / "out", I2V, given(I2V, **paths), complaint)
    bundle = import_checkpoint(I2V, given(I2V, **paths), tmp_path / "out", recipe=BY_ROW)
    assert (bundle.recipe.linear, bundle.recipe.attention) == ("w8a8-row", "dense")
