"""The definition of the W8A8 linear: quantise, multiply in integers, rescale.

Two granularities, told apart by the weight's scale. Upstream's has one scale per tile of 128x128 on either side, and
rescales every 128 of K. The finer one has a scale per row, that is per token and per output, and rescales once.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE = 128
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


def w8a8_linear(x: Tensor, int8_weight_NK: Tensor, scale: Tensor, bias_N: Tensor) -> Tensor:
    """``x @ W.T + bias`` with `x` quantised on the fly.

    By tiles, each slab of K as wide as a tile is multiplied in integers, which is exact (at most 2^22 for tiles of 256,
    so float32 holds every partial sum), then rescaled and added up in float32 in ascending order. By rows, all of K is
    added up in integers (exact in int32 up to K = 130,000, and here in float64), rounded to float32 and rescaled. The
    result is rounded to the type of `x`, and again after the bias.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16. Rows are tiled in storage order, across leading dimensions.
        int8_weight_NK: ``int8 [N, K]``, K a multiple of the tile.
        scale: ``float32 [ceil(N/tile), K/tile]``, which tells how large a tile is, or ``[N]`` for scales by row.
        bias_N: ``[N]``, any float type.

    Returns:
        ``[..., N]``, the type of `x`.

    Source: TurboDiffusion, ops/gemm (docs/sources.md).
    """
    x_MK = x.reshape(-1, x.shape[-1])
    total_MN = _by_rows(x_MK, int8_weight_NK, scale) if scale.dim() == 1 else _by_tiles(x_MK, int8_weight_NK, scale)
    y_MN = total_MN.to(x.dtype) + bias_N.to(x.dtype)
    return y_MN.unflatten(0, x.shape[:-1])


def tile_of(int8_weight_NK: Tensor, scale: Tensor) -> int:
    """Rows and columns of the tiles that a matrix's scales are for."""
    return int8_weight_NK.shape[1] // scale.shape[1]


def _by_rows(x_MK: Tensor, int8_weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    int8_x_MK, x_scale_M = quantise_rows(x_MK)
    sums_MN = (int8_x_MK.double() @ int8_weight_NK.double().T).float()
    return sums_MN * (x_scale_M[:, None] * scale_N)


def _by_tiles(x_MK: Tensor, int8_weight_NK: Tensor, scale: Tensor) -> Tensor:
    tile = tile_of(int8_weight_NK, scale)
    int8_x_MK, x_scale = quantise_tiles(x_MK, tile)
    rows, columns = x_MK.shape[0], int8_weight_NK.shape[0]
    total_MN = x_MK.new_zeros((rows, columns), dtype=torch.float32)
    for slab, (x_steps, w_steps) in enumerate(
        zip(int8_x_MK.split(tile, 1), int8_weight_NK.split(tile, 1), strict=True)
    ):
        row_scale = x_scale[:, slab].repeat_interleave(tile)[:rows, None]
        column_scale = scale[:, slab].repeat_interleave(tile)[:columns]
        total_MN += (x_steps.float() @ w_steps.float().T) * (row_scale * column_scale)
    return total_MN
