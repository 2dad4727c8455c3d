"""The kernel of layer norm, with plain weights or a timestep's modulation, and optionally with 8-bit output."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import TILE, quantise_tile


@triton.jit
def norm(
    x, y, y_scale, gain, offset,
    M, x_stride, eps, padding,
    D: tl.constexpr,
    MODULATED: tl.constexpr,
):  # fmt: skip
    """Normalise x [M, D] over D, multiply by `gain` [D], add `offset` [D] and store y [M, D], quantised if `y_scale` is
    given.

    The second read of x comes from the cache: a program's 128 rows are at most 1.3 MB.
    """
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    lane = tl.arange(0, TILE)[None, :]
    x += rows * x_stride + lane
    y += rows * D + lane
    inside = rows < M

    # The mean and the sum of squared distances from it, updated tile by tile (Chan, Golub, LeVeque 1979).
    mean = tl.zeros((TILE, 1), tl.float32)
    distance = tl.zeros((TILE, 1), tl.float32)
    for column in range(0, D, TILE):
        values = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        tile_mean = tl.sum(values, 1, keep_dims=True) * (1.0 / TILE)
        centred = values - tile_mean
        delta = tile_mean - mean
        before = column * 1.0
        share = TILE / (before + TILE)
        mean += delta * share
        distance += tl.sum(centred * centred, 1, keep_dims=True) + delta * delta * (before * share)
    scale = tl.rsqrt(distance * (1.0 / D) + padding * mean * mean + eps)

    for column in range(0, D, TILE):
        values = tl.load(x + column, mask=inside, other=0.0)
        result = (values.to(tl.float32) - mean) * scale
        factor, shift = tl.load(gain + column + lane).to(tl.float32), tl.load(offset + column + lane).to(tl.float32)
        if MODULATED:
            result = result.to(values.dtype).to(tl.float32) * (1.0 + factor) + shift
        else:
            result = result * factor + shift
        result = result.to(values.dtype)
        if y_scale is not None:
            steps, step = quantise_tile(tl.where(inside, result.to(tl.float32), 0.0))
            tl.store(y + column, steps, mask=inside)
            tl.store(y_scale + tl.program_id(0).to(tl.int64) * (D // TILE) + column // TILE, step)
        else:
            tl.store(y + column, result, mask=inside)
