"""What a recipe makes of an unquantised weight: the tensors that take its place, by the last parts of their names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wanforge.configs.recipe import Recipe
from wanforge.plugins.nvfp4_linear import reference as nvfp4
from wanforge.plugins.quantiser import reference as eight_bits

WEIGHTS = ("int8_weight", "fp8_weight", "fp4_weight")
"""The numbers, of which 4-bit ones are packed in pairs."""
PARTS = (*WEIGHTS, "scale", "global_scale")
"""Everything that can be computed from an unquantised weight."""


def unquantised_name(name: str) -> str:
    """The name of the weight that a part belongs to: ``blocks.0.ffn.0.weight`` for ``blocks.0.ffn.0.scale``. Other
    names are returned as they are."""
    layer, _, part = name.rpartition(".")
    return f"{layer}.weight" if part in PARTS else name


def quantise(weight_NK: Tensor, recipe: Recipe, global_scale: Tensor | None = None) -> dict[str, Tensor]:
    """Quantise a weight, or whole bands of its tiles.

    Published weights are bfloat16; a wider one is rounded first, as upstream's conversion does.

    Args, Returns: See `quantise_exactly`.
    """
    return quantise_exactly(weight_NK.to(torch.bfloat16), recipe, global_scale)


def quantise_exactly(weight_NK: Tensor, recipe: Recipe, global_scale: Tensor | None = None) -> dict[str, Tensor]:
    """Quantise a weight, or whole bands of its tiles, from its values as they are.

    Args:
        weight_NK: ``[N, K]``, any float type.
        recipe: One that quantises.
        global_scale: The global scale of the whole weight, where the recipe has one; by default, that of these rows.

    Returns:
        The parts by name. The global scale is in it where the recipe has one.
    """
    match recipe.linear:
        case "nvfp4":
            scale_of_all = nvfp4.global_scale_of(weight_NK.abs().amax()) if global_scale is None else global_scale
            packed, scale = nvfp4.quantise_weight(weight_NK, scale_of_all)
            return {"fp4_weight": packed, "scale": scale, "global_scale": scale_of_all}
        case "w8a8-row":
            steps, scale = eight_bits.quantise_rows(weight_NK)
        case "fp8-row":
            steps, scale = eight_bits.quantise_rows(weight_NK, torch.float8_e4m3fn)
            return {"fp8_weight": steps, "scale": scale}
        case _:
            steps, scale = eight_bits.quantise_tiles(weight_NK, recipe.tile)
    return {"int8_weight": steps, "scale": scale}


def dequantised(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """The float32 values that a layer's quantised weight of this name represents."""
    layer, _, part = name.rpartition(".")
    if part == "fp4_weight":
        return nvfp4.dequantise(weights[name], weights[f"{layer}.scale"], weights[f"{layer}.global_scale"])
    return eight_bits.dequantise(weights[name], weights[f"{layer}.scale"])
