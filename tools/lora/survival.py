"""How much of a LoRA is left in 8-bit weights, by the way of merging it: a table, measured on TinyWan's linears.

    python -m tools.lora.survival

The size of a LoRA is the norm of what it adds, relative to that of the weight. What survives is the part of it that the
merged weight differs by from the base's own 8-bit weight, along the LoRA. The error is that of the merged weight,
relative to the exact sum.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.tensorfile import read_header
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.plugins.quantiser.reference import dequantise, quantise_tiles
from wanforge.runtime.lora.rounding import requantise
from wanforge.runtime.memory.weights import map_tensors

SIZES = (0.002, 0.005, 0.02, 0.1)
RANK = 16
TILE = 128

Way = Callable[[Tensor, Tensor], Tensor]
"""Returns what a merged weight represents, given the weight and what is added."""


class Product(NamedTuple):
    """What is added, as factors ``[N, R]`` and ``[R, K]``."""

    up_NR: Tensor
    down_RK: Tensor

    def rounded(self) -> "Product":
        return Product(self.up_NR.bfloat16().float(), self.down_RK.bfloat16().float())

    def sum(self) -> Tensor:
        return self.up_NR @ self.down_RK


def rounded(weight_NK: Tensor) -> Tensor:
    return dequantise(*quantise_tiles(weight_NK))


def stochastic(scale: Callable[[Tensor, Tensor], Tensor]) -> Way:
    """Stochastic rounding of the 8-bit base, with the scales that a function of the old ones and the sum gives."""

    def way(weight_NK: Tensor, added_NK: Tensor) -> Tensor:
        steps, old = quantise_tiles(weight_NK)
        total = dequantise(steps, old) + added_NK
        new = scale(old, total).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        exact = total / new[: len(total)]
        up = torch.rand(exact.shape) < exact - exact.floor()
        return (exact.floor() + up).clamp(-128, 127) * new[: len(total)]

    return way


def kept_scales(weight_NK: Tensor, added_NK: Tensor) -> Tensor:
    """What `runtime/lora/rounding.py` does."""
    steps, scale = quantise_tiles(weight_NK)
    generator, rows = torch.Generator().manual_seed(0), []
    for band, row in enumerate(range(0, len(weight_NK), TILE)):
        stop = row + TILE
        rows.append(dequantise(*requantise(steps[row:stop], scale[band][None], added_NK[row:stop], generator)))
    return torch.cat(rows)


def old_scales(weight_NK: Tensor, added_NK: Tensor) -> Tensor:
    steps, scale = quantise_tiles(weight_NK)
    wide = scale.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[: len(weight_NK)]
    return torch.round((steps * wide + added_NK) / wide).clamp(-128, 127) * wide


WAYS: dict[str, Way] = {
    "unquantised base, new scales": lambda w, d: rounded(w + d),
    "the same, rounded to bfloat16 first": lambda w, d: rounded((w + d).bfloat16()),
    "8-bit base, nearest, new scales": lambda w, d: rounded(rounded(w) + d),
    "8-bit base, nearest, old scales": old_scales,
    "8-bit base, stochastic, new scales": stochastic(lambda _, total: quantise_tiles(total)[1]),
    "8-bit base, stochastic, kept scales": kept_scales,
}

SIDE_PATHS: dict[str, Callable[[Tensor, Product], Tensor]] = {
    "side path on the 8-bit base": lambda w, product: rounded(w) + product.sum(),
    "the same, factors in bfloat16": lambda w, product: rounded(w) + product.rounded().sum(),
}
"""Returns what a weight and the product beside it represent together."""


def linears() -> list[Tensor]:
    """The weights of TinyWan's blocks that W8A8 quantises."""
    path = embedded(load_model("tinywan")).weights["dit"]
    stored, recipe = map_tensors(path), load_recipe("w8a8")
    assert recipe.tile == TILE
    names = [n for n, s in read_header(path).tensors.items() if n.startswith("blocks.") and len(s.shape) == 2]
    return [stored[n].float() for n in names if n.endswith(".weight") and ".proj_l." not in n]


def of_sum(way: Way) -> Callable[[Tensor, Product], Tensor]:
    return lambda weight_NK, product: way(weight_NK, product.sum())


def measured(way: Callable[[Tensor, Product], Tensor], size: float) -> tuple[float, float]:
    """The error and what survives, over all linears."""
    generator = torch.Generator().manual_seed(1)
    wrong = exact = along = whole = 0.0
    for weight_NK in linears():
        rows, columns = weight_NK.shape
        product = Product(*(torch.randn(shape, generator=generator) for shape in ((rows, RANK), (RANK, columns))))
        product = product._replace(up_NR=product.up_NR * (size * weight_NK.norm() / product.sum().norm()))
        added_NK, merged_NK = product.sum(), way(weight_NK, product)
        wrong += float((merged_NK - weight_NK - added_NK).square().sum())
        exact += float((weight_NK + added_NK).square().sum())
        along += float(((merged_NK - rounded(weight_NK)) * added_NK).sum())
        whole += float(added_NK.square().sum())
    return (wrong / exact) ** 0.5, along / whole


def main() -> None:
    torch.manual_seed(0)
    print(f"{len(linears())} linears of TinyWan, LoRAs of rank {RANK}: error in %, and what survives, by size")
    print("| way | " + " | ".join(f"{size:g}" for size in SIZES) + " |")
    print("|---|" + "--:|" * len(SIZES))
    for name, way in {**{name: of_sum(way) for name, way in WAYS.items()}, **SIDE_PATHS}.items():
        found = [measured(way, size) for size in SIZES]
        print(f"| {name} | " + " | ".join(f"{100 * error:.2f}, {left:.2f}" for error, left in found) + " |")


if __name__ == "__main__":
    main()
