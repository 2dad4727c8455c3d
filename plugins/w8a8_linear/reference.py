"""The definition of the W8A8 linear: quantise, multiply 8-bit steps, rescale.

There are two granularities, distinguished by the shape of the weight's scale. Upstream's has one scale per tile of
128x128 for both operands and rescales after every 128 of K. The finer one has one scale per row, that is per token and
per output, and rescales once; its steps are integers or 8-bit floats (e4m3).
"""

import torch
from torch import Tensor

from wanforge.plugins.quantiser.reference import quantise_rows, quantise_tiles, tile_of


def w8a8_linear(x: Tensor, weight_NK: Tensor, scale: Tensor, bias_N: Tensor) -> Tensor:
    """``x @ W.T + bias`` with `x` quantised on the fly.

    By tiles, each slab of K as wide as a tile is multiplied in integers, which is exact (at most 2^22 for tiles of 256,
    so float32 holds every partial sum), then rescaled and summed in float32 in ascending order. By rows, all of K is
    summed exactly (in int32 up to K = 130,000, and here in float64, which also holds every sum of products of e4m3),
    rounded to float32 and rescaled. The result is rounded to the type of `x`, and again after the bias is added.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16. Rows are tiled in storage order across leading dimensions.
        weight_NK: ``int8 [N, K]``, K a multiple of the tile, or e4m3 with scales by row; `x` is quantised to
            the same type.
        scale: ``float32 [ceil(N/tile), K/tile]``, which implies the tile size, or ``[N]`` for scales by row.
        bias_N: ``[N]``, any float type.

    Returns:
        ``[..., N]`` in the type of `x`.

    Source: TurboDiffusion, ops/gemm (docs/sources.md).
    """
    x_MK = x.reshape(-1, x.shape[-1])
    total_MN = _by_rows(x_MK, weight_NK, scale) if scale.dim() == 1 else _by_tiles(x_MK, weight_NK, scale)
    y_MN = total_MN.to(x.dtype) + bias_N.to(x.dtype)
    return y_MN.unflatten(0, x.shape[:-1])


def multiply_rows(x_MK: Tensor, x_scale_M: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """The product of two matrices that are quantised by rows, float32 ``[M, N]``."""
    sums_MN = (x_MK.double() @ weight_NK.double().T).float()
    return sums_MN * (x_scale_M[:, None] * scale_N)


def _by_rows(x_MK: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    return multiply_rows(*quantise_rows(x_MK, weight_NK.dtype), weight_NK, scale_N)


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
