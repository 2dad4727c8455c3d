"""The definition of 8-bit quantisation, with one scale per tile or one per row.

Upstream has a scale per tile of 128x128 values. The finer form has a scale per row: per token of activations, and per
output of a weight.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from wanforge.plugins.quantiser import TILE

TILES = (64, TILE, 256)
"""Upstream's, and two for comparison."""
FULL_SCALE = 128.0
ROW_FULL_SCALE = 127.0
AMAX_FLOOR = 1e-8


def quantise_tiles(x_RC: Tensor, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """Quantise a matrix symmetrically, one scale per tile of 128 rows and 128 columns, or of as many as `tile` says.

    The full scale is 128, not 127: the largest negative value of a tile maps to -128 exactly, the largest positive
    one saturates at 127. Halves round to even. A ragged last tile counts what lies outside as zero.

    Args:
        x_RC: ``[R, C]``, any float type; the arithmetic is float32.

    Returns:
        ``int8 [R, C]`` and ``float32 [ceil(R/tile), ceil(C/tile)]``, the factor that restores the value.

    Source: TurboDiffusion, ops/quant (docs/sources.md).
    """
    rows, columns = x_RC.shape
    padded = pad(x_RC.float(), (0, -columns % tile, 0, -rows % tile))
    tiles = padded.unflatten(1, (-1, tile)).unflatten(0, (-1, tile))
    amax = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp_min(AMAX_FLOOR)
    steps = torch.round(tiles * (FULL_SCALE / amax)).clamp(-128, 127).to(torch.int8)
    return steps.flatten(2).flatten(0, 1)[:rows, :columns], (amax / FULL_SCALE)[:, 0, :, 0]


def quantise_rows(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix symmetrically, one scale per row; the largest magnitude of a row maps to 127, halves round to
    even.

    Args:
        x_RC: ``[R, C]``, any float type; the arithmetic is float32.

    Returns:
        ``int8 [R, C]`` and ``float32 [R]``, the factor that restores the value.
    """
    x = x_RC.float()
    amax = x.abs().amax(1).clamp_min(AMAX_FLOOR)
    # A number over a tensor would be its reciprocal times the number, rounded twice.
    factor = torch.full_like(amax, ROW_FULL_SCALE) / amax
    steps = torch.round(x * factor[:, None])
    return steps.to(torch.int8), amax / ROW_FULL_SCALE


def dequantise(steps_RC: Tensor, scale: Tensor) -> Tensor:
    """The values that 8-bit steps stand for, float32 ``[R, C]``.

    Args:
        scale: what `quantise_tiles` or `quantise_rows` made with them. As many columns as whole tiles fill.
    """
    if scale.dim() == 1:
        return steps_RC.float() * scale[:, None]
    tile = tile_of(steps_RC, scale)
    return steps_RC.float() * scale.repeat_interleave(tile, 0)[: len(steps_RC)].repeat_interleave(tile, 1)


def tile_of(int8_weight_NK: Tensor, scale: Tensor) -> int:
    """Rows and columns of the tiles that a matrix's scales are for."""
    return int8_weight_NK.shape[1] // scale.shape[1]
