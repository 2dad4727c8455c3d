"""How other projects write down a quantised weight, for synthetic files: the inverse of `checkpoint.formats`.

Each layout is a function of a weight ``[N, K]`` that returns the tensors of its layer, by the last part of their names.
It also works on the meta device, where it tells their shapes and types.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from wanforge.exporter.checkpoint.formats.four_bits import swizzled
from wanforge.plugins.nvfp4_linear.reference import global_scale_of, quantise_weight
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.reference import ROW_FULL_SCALES, quantise_rows

Parts = dict[str, Tensor]
E4M3 = torch.float8_e4m3fn


def note(weight_format: str) -> Tensor:
    """ComfyUI's text about a layer."""
    return torch.tensor(list(json.dumps({"format": weight_format}).encode()), dtype=torch.uint8)


def by_row(weight_NK: Tensor, dtype: torch.dtype) -> Parts:
    """8-bit numbers with a scale per output."""
    numbers, scale_N = quantise_rows(weight_NK, dtype)
    return {"weight": numbers, "weight_scale": scale_N[:, None]}


def in_all(weight_NK: Tensor, dtype: torch.dtype, scale: str = "weight_scale") -> Parts:
    """8-bit numbers with one scale."""
    numbers, scale_1 = quantise_rows(weight_NK.reshape(1, -1), dtype)
    return {"weight": numbers.view(weight_NK.shape), scale: scale_1[0]}


def by_tile(weight_NK: Tensor) -> Parts:
    """8-bit floats with a scale per tile. Both sizes must be whole tiles."""
    tiles = weight_NK.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).transpose(1, 2).flatten(2)
    numbers, scale = quantise_rows(tiles.flatten(0, 1), E4M3)
    grid = tiles.shape[:2]
    numbers = numbers.view(torch.uint8).view(*grid, TILE, TILE).transpose(1, 2).reshape(weight_NK.shape)
    return {"weight": numbers.view(E4M3), "weight_scale": scale.view(grid)}


def in_four_bits(weight_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The packed numbers, the scales of blocks and the global scale of NVFP4."""
    global_scale = global_scale_of(weight_NK.abs().amax())
    return *quantise_weight(weight_NK, global_scale), global_scale


def lightx2v_nvfp4(weight_NK: Tensor) -> Parts:
    packed, scale, global_scale = in_four_bits(weight_NK)
    return {"weight": packed, "weight_scale": as_read(scale), "weight_global_scale": 1 / global_scale}


def comfy_nvfp4(weight_NK: Tensor) -> Parts:
    packed, scale, global_scale = in_four_bits(weight_NK)
    parts = {"weight": packed >> 4 | packed << 4, "weight_scale": as_read(scale), "weight_scale_2": global_scale}
    return {**parts, "comfy_quant": note("nvfp4")}


def modelopt_nvfp4(weight_NK: Tensor) -> Parts:
    packed, scale, global_scale = in_four_bits(weight_NK)
    inputs = torch.ones_like(global_scale)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": global_scale, "input_scale": inputs}


def as_read(scale_NB: Tensor) -> Tensor:
    """Scales of blocks in the order in which tensor cores read them."""
    return swizzled(scale_NB.view(torch.uint8)).view(E4M3)


LAYOUTS: dict[str, Callable[[Tensor], Parts]] = {
    "lightx2v-int8": lambda w: by_row(w, torch.int8),
    "lightx2v-fp8": lambda w: by_row(w, E4M3),
    "lightx2v-fp8-b128": by_tile,
    "lightx2v-nvfp4": lightx2v_nvfp4,
    "comfy-int8": lambda w: {**in_all(w, torch.int8), "comfy_quant": note("int8_tensorwise")},
    "comfy-scaled-fp8": lambda w: in_all(w, E4M3, "scale_weight"),
    "comfy-fp8": lambda w: {**in_all(w, E4M3), "comfy_quant": note("float8_e4m3fn")},
    "comfy-nvfp4": comfy_nvfp4,
    "modelopt-fp8": lambda w: in_all(w, E4M3),
    "modelopt-nvfp4": modelopt_nvfp4,
    "fp8-cast": lambda w: {"weight": w.clamp(-ROW_FULL_SCALES[E4M3], ROW_FULL_SCALES[E4M3]).to(E4M3)},
}
"""The layouts of safetensors files, by the names that `formats` gives them."""
