"""What a recipe makes of an unquantised weight: the tensors that take its place, by the last parts of their names."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from wanforge.configs.recipe import Recipe
from wanforge.plugins.int8_convolution import reference as convolution
from wanforge.plugins.nvfp4_linear import reference as nvfp4
from wanforge.plugins.quantiser import reference as eight_bits

WEIGHTS = ("int8_weight", "fp8_weight", "fp4_weight")
"""The numbers, of which 4-bit ones are packed in pairs."""
PARTS = (*WEIGHTS, "scale", "global_scale")
"""Everything that can be computed from an unquantised weight."""

NORMS = {"2": "0", "6": "3"}
"""The number of the norm before a convolution of the VAE."""


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


def norm_before(name: str) -> str:
    """The gain of the norm before a convolution of the VAE that is quantised: ``decoder.head.0.gamma`` for
    ``decoder.head.2.weight``. Upstream numbers the layers of a residual and of the head."""
    group, number, _ = name.rsplit(".", 2)
    return f"{group}.{NORMS[number]}.gamma"


def quantise_convolution(weight_OITHW: Tensor, gain_I: Tensor) -> dict[str, Tensor]:
    """The parts, by name, of a convolution of the VAE that is quantised; see `convolution.quantise_weight`."""
    steps, scale = convolution.quantise_weight(weight_OITHW, gain_I)
    return {"int8_weight": steps, "scale": scale}


def quantised_vae(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a VAE with convolutions in int8, by name, made of those of one without."""
    found = {}
    for name in names:
        weight, leaf = unquantised_name(name), name.rpartition(".")[2]
        is_part = name not in state
        found[name] = quantise_convolution(state[weight], state[norm_before(weight)])[leaf] if is_part else state[name]
    return found


def dequantised(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """The float32 values that a layer's quantised weight of this name represents."""
    layer, _, part = name.rpartition(".")
    if part == "fp4_weight":
        return nvfp4.dequantise(weights[name], weights[f"{layer}.scale"], weights[f"{layer}.global_scale"])
    return eight_bits.dequantise(weights[name], weights[f"{layer}.scale"])
