"""The definition of 8-bit quantisation, with one scale per tile or one per row.

Upstream has one scale per tile of 128x128 values. The finer form has one scale per row: per token of the activations,
per output of a weight.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from wanforge.plugins.quantiser import TILE

TILES = (64, TILE, 256)
"""Tile sizes: upstream's 128, and two others for comparison."""
FULL_SCALE = 128.0
ROW_FULL_SCALES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What the largest magnitude of a row becomes, by the type of the steps: the largest number of the type."""
AMAX_FLOOR = 1e-8


def quantise_tiles(x_RC: Tensor, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """Quantise a matrix symmetrically, with one scale per tile of `tile` rows and columns.

    The full scale is 128, not 127: the largest negative value of a tile maps to -128 exactly, the largest positive
    one saturates at 127. Halves round to even. Ragged last tiles are padded with zeros.

    Args:
        x_RC: ``[R, C]``, any float type; the arithmetic is in float32.

    Returns:
        ``int8 [R, C]`` and ``float32 [ceil(R/tile), ceil(C/tile)]``, the factors that restore the values.

    Source: TurboDiffusion, ops/quant (docs/sources.md).
    """
    rows, columns = x_RC.shape
    padded = pad(x_RC.float(), (0, -columns % tile, 0, -rows % tile))
    tiles = padded.unflatten(1, (-1, tile)).unflatten(0, (-1, tile))
    amax = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp_min(AMAX_FLOOR)
    steps = torch.round(tiles * (FULL_SCALE / amax)).clamp(-128, 127).to(torch.int8)
    return steps.flatten(2).flatten(0, 1)[:rows, :columns], (amax / FULL_SCALE)[:, 0, :, 0]


def quantise_rows(x_RC: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Quantise a matrix symmetrically, with one scale per row. The largest magnitude of a row maps to the largest
    number of the type, and what lies halfway between two numbers goes to the even one.

    Args:
        x_RC: ``[R, C]``, any float type; the arithmetic is in float32.
        dtype: int8, or e4m3, whose 256 numbers are closer together where they are small.

    Returns:
        The steps ``[R, C]`` in that type, and ``float32 [R]``, the factors that restore the values.
    """
    x = x_RC.float()
    amax = x.abs().amax(1).clamp_min(AMAX_FLOOR)
    # PyTorch divides a number by a tensor, and on a GPU a tensor by a number, by multiplying with the reciprocal, which
    # rounds twice.
    full_scale = torch.full_like(amax, ROW_FULL_SCALES[dtype])
    steps = x * (full_scale / amax)[:, None]
    return (torch.round(steps) if dtype == torch.int8 else steps).to(dtype), amax / full_scale


def dequantise(steps_RC: Tensor, scale: Tensor) -> Tensor:
    """The values that 8-bit steps represent, float32 ``[R, C]``.

    Args:
        scale: The scale from `quantise_tiles` or `quantise_rows`. For tiles, C must be a multiple of the tile size.
    """
    if scale.dim() == 1:
        return steps_RC.float() * scale[:, None]
    tile = tile_of(steps_RC, scale)
    return steps_RC.float() * scale.repeat_interleave(tile, 0)[: len(steps_RC)].repeat_interleave(tile, 1)


def tile_of(int8_weight_NK: Tensor, scale: Tensor) -> int:
    """The tile size, in rows and columns, of a matrix whose scales are per tile."""
    return int8_weight_NK.shape[1] // scale.shape[1]
