"""Other projects' layouts of quantised weights, written down plainly, and independently of the code that reads them.

An encoder takes a weight ``[N, K]`` and returns what a file holds of it, by the part of the name that follows the
layer's, the float32 values that this stands for, and the parts of the recipe that holds the same numbers.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.exporter.checkpoint.sources import State, without

E4M3 = torch.float8_e4m3fn
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


class Encoded(NamedTuple):
    stored: State
    values: Tensor
    recipe: str
    parts: State


Encoder = Callable[[Tensor], Encoded]


def note(**said: object) -> Tensor:
    """ComfyUI's text about a layer."""
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def lightx2v_int8(weight: Tensor) -> Encoded:
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-5) / 127
    steps = torch.clamp(torch.round(weight.float() / scale), -128, 127).to(torch.int8)
    parts = {"int8_weight": steps, "scale": scale[:, 0]}
    return Encoded({"weight": steps, "weight_scale": scale}, steps.float() * scale, "w8a8-row", parts)


def comfy_int8(weight: Tensor) -> Encoded:
    scale = weight.float().abs().max() / 127
    steps = torch.round(weight.float() / scale).clamp(-127, 127).to(torch.int8)
    stored = {"weight": steps, "weight_scale": scale, "comfy_quant": note(format="int8_tensorwise")}
    parts = {"int8_weight": steps, "scale": scale.repeat(len(weight))}
    return Encoded(stored, steps.float() * scale, "w8a8-row", parts)


def comfy_int8_rows(weight: Tensor) -> Encoded:
    found = lightx2v_int8(weight)
    return found._replace(stored={**found.stored, "comfy_quant": note(format="int8_tensorwise", convrot=False)})


def lightx2v_fp8(weight: Tensor) -> Encoded:
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-5) / 448
    numbers = (weight.float() / scale).clamp(-448, 448).to(E4M3)
    parts = {"fp8_weight": numbers, "scale": scale[:, 0]}
    return Encoded({"weight": numbers, "weight_scale": scale}, numbers.float() * scale, "fp8-row", parts)


def lightx2v_fp8_tiles(weight: Tensor) -> Encoded:
    rows, columns = weight.shape
    scale = torch.zeros(-(-rows // 128), -(-columns // 128))
    numbers, values = torch.zeros(rows, columns).to(E4M3), torch.zeros(rows, columns)
    for i in range(len(scale)):
        for j in range(len(scale[0])):
            place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = weight[place].float().abs().max() / 448
            numbers[place] = (weight[place].float() / scale[i, j]).to(E4M3)
            values[place] = numbers[place].float() * scale[i, j]
    return Encoded({"weight": numbers, "weight_scale": scale}, values, "", {})


def scaled_fp8(weight: Tensor, **names: object) -> Encoded:
    scale = weight.float().abs().max() / 448
    numbers = (weight.float() / scale).to(E4M3)
    parts = {"fp8_weight": numbers, "scale": scale.repeat(len(weight))}
    return Encoded({"weight": numbers, "scale": scale}, numbers.float() * scale, "fp8-row", parts)


def comfy_scaled_fp8(weight: Tensor) -> Encoded:
    found = scaled_fp8(weight)
    stored = {"weight": found.stored["weight"], "scale_weight": found.stored["scale"], "scale_input": torch.ones(1)}
    return found._replace(stored=stored)


def comfy_fp8(weight: Tensor) -> Encoded:
    found = scaled_fp8(weight)
    said = note(format="float8_e4m3fn")
    stored = {"weight": found.stored["weight"], "weight_scale": found.stored["scale"], "comfy_quant": said}
    return found._replace(stored=stored)


def modelopt_fp8(weight: Tensor) -> Encoded:
    found = scaled_fp8(weight)
    stored = {"weight": found.stored["weight"], "weight_scale": found.stored["scale"], "input_scale": torch.tensor(0.1)}
    return found._replace(stored=stored)


def cast_fp8(weight: Tensor) -> Encoded:
    numbers = weight.to(E4M3)
    parts = {"fp8_weight": numbers, "scale": torch.ones(len(weight))}
    return Encoded({"weight": numbers}, numbers.float(), "fp8-row", parts)


def cast_e5m2(weight: Tensor) -> Encoded:
    numbers = weight.to(torch.float8_e5m2)
    return Encoded({"weight": numbers}, numbers.float(), "", {})


def blocks_of_16(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The codes ``[N, K]``, scales ``[N, K/16]``, global scale and values of NVFP4."""
    whole = weight.float().abs().max() / 2688
    blocks = weight.float().unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(2) / 6 / whole).to(E4M3)
    ratio = blocks / (scale.float() * whole)[:, :, None]
    codes = (ratio.abs()[..., None] - FP4).abs().argmin(-1)
    values = (FP4[codes] * ratio.sign() * scale.float()[:, :, None]).flatten(1) * whole
    return (codes + 8 * (ratio < 0)).flatten(1).to(torch.uint8), scale, whole, values


def in_tiles(scale: Tensor) -> Tensor:
    """Scales as cuBLAS reads them: one by one, to the place that its documentation gives."""
    rows, columns = -(-scale.shape[0] // 128) * 128, -(-scale.shape[1] // 4) * 4
    placed = torch.zeros(rows * columns, dtype=torch.uint8)
    bits = scale.view(torch.uint8)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            tile = (row // 128) * (columns // 4) + column // 4
            placed[tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4] = bits[row, column]
    return placed.view(rows, columns).view(E4M3)


def nvfp4(weight: Tensor, *, low: int) -> tuple[Tensor, Encoded]:
    """Packed numbers, whose even ones are in the lower half of bytes if `low` is 0, and what they are."""
    codes, scale, whole, values = blocks_of_16(weight)
    packed = codes[:, low::2] + 16 * codes[:, 1 - low :: 2]
    parts = {"fp4_weight": codes[:, ::2] + 16 * codes[:, 1::2], "scale": scale, "global_scale": whole}
    return packed, Encoded({}, values, "nvfp4", parts)


def modelopt_nvfp4(weight: Tensor) -> Encoded:
    packed, found = nvfp4(weight, low=0)
    stored = {"weight": packed, "weight_scale": found.parts["scale"], "weight_scale_2": found.parts["global_scale"]}
    return found._replace(stored={**stored, "input_scale": torch.tensor(0.01)})


def comfy_nvfp4(weight: Tensor) -> Encoded:
    packed, found = nvfp4(weight, low=1)
    scale = in_tiles(found.parts["scale"])
    stored = {"weight": packed, "weight_scale": scale, "weight_scale_2": found.parts["global_scale"]}
    return found._replace(stored={**stored, "comfy_quant": note(format="nvfp4")})


def lightx2v_nvfp4(weight: Tensor) -> Encoded:
    """The inverse of the global scale is rounded, and so is the inverse of that."""
    packed, found = nvfp4(weight, low=0)
    inverse = 2688 / weight.float().abs().max()
    factor = torch.ones(()) / inverse
    scale = found.parts["scale"]
    values = found.values / found.parts["global_scale"] * factor
    stored = {"weight": packed, "weight_scale": in_tiles(scale), "weight_global_scale": inverse}
    parts = {**found.parts, "global_scale": factor}
    return Encoded({**stored, "input_absmax": torch.ones(1)}, values, "nvfp4", parts)


LAYOUTS: dict[str, Encoder] = {
    "lightx2v-int8": lightx2v_int8,
    "comfy-int8": comfy_int8,
    "comfy-int8 by row": comfy_int8_rows,
    "lightx2v-fp8": lightx2v_fp8,
    "lightx2v-fp8-b128": lightx2v_fp8_tiles,
    "comfy-scaled-fp8": comfy_scaled_fp8,
    "comfy-fp8": comfy_fp8,
    "modelopt-fp8": modelopt_fp8,
    "fp8-cast": cast_fp8,
    "fp8-cast of e5m2": cast_e5m2,
    "modelopt-nvfp4": modelopt_nvfp4,
    "comfy-nvfp4": comfy_nvfp4,
    "lightx2v-nvfp4": lightx2v_nvfp4,
}
"""The encoders by the names of their layouts, and by what else tells them apart."""


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether this is the weight of a linear in a block, which every author quantises."""
    return name.startswith("blocks.") and name.endswith(".weight") and tensor.dim() == 2 and "proj_l" not in name


def encoded(state: State, encoder: Encoder) -> tuple[State, dict[str, Encoded]]:
    """A file's tensors without those of sparse-linear attention, and each quantised weight by the name of its layer."""
    plain = without(state, "proj_l")
    weights = {n.removesuffix(".weight"): encoder(t) for n, t in plain.items() if is_linear(n, t)}
    stored = {f"{layer}.{part}": t for layer, found in weights.items() for part, t in found.stored.items()}
    return {**{n: t for n, t in plain.items() if n.removesuffix(".weight") not in weights}, **stored}, weights
