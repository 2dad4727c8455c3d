"""The kernel of layer norm, with plain weights or a timestep's modulation, and optionally with 8-bit output."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import TILE, load_rows, quantise_tile, rounded, store_quantised


@triton.jit
def norm(
    x, y, y_scale, gain, offset,
    M, x_stride, eps, padding,
    D: tl.constexpr,
    MODULATED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Normalise x [M, D] over D, multiply by `gain` [D], add `offset` [D] and store y [M, D], quantised if `y_scale` is
    given.

    x is read twice, because the 128 rows of a program are up to 1.3 MB. While a tile of them is computed, STAGES - 1
    others are on their way.
    """
    first = tl.program_id(0).to(tl.int64) * TILE
    row = tl.arange(0, TILE)[:, None]
    lane = tl.arange(0, TILE)[None, :]
    x += first * x_stride + (row * x_stride + lane)
    y += first * D + (row * D + lane)
    inside = row < M - first
    dtype = x.dtype.element_ty

    # Distances from the mean of a row's first tile. The square of their mean, which is taken off below, is at most
    # D / 128 - 1 times the variance, so few digits cancel.
    centre = tl.sum(tl.load(x, mask=inside, other=0.0).to(tl.float32), 1, keep_dims=True) * (1.0 / TILE)
    sums = tl.zeros((TILE, 1), tl.float32)
    squares = tl.zeros((TILE, 1), tl.float32)
    for column in tl.range(0, D, TILE, num_stages=STAGES):
        distance = tl.load(x + column, mask=inside, other=0.0).to(tl.float32) - centre
        sums += tl.sum(distance, 1, keep_dims=True)
        squares += tl.sum(distance * distance, 1, keep_dims=True)
    moved = sums * (1.0 / D)
    mean = centre + moved
    variance = squares * (1.0 / D) - moved * moved
    scale = tl.rsqrt(variance + padding * mean * mean + eps)

    for column in tl.range(0, D, TILE, num_stages=STAGES):
        values = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        result = (values - mean) * scale
        factor, shift = tl.load(gain + column + lane).to(tl.float32), tl.load(offset + column + lane).to(tl.float32)
        if MODULATED:
            result = rounded(result, dtype) * (1.0 + factor) + shift
        else:
            result = result * factor + shift
        if y_scale is not None:
            steps, step = quantise_tile(tl.where(inside, rounded(result, dtype), 0.0))
            tl.store(y + column, steps, mask=inside)
            tl.store(y_scale + tl.program_id(0).to(tl.int64) * (D // TILE) + column // TILE, step)
        else:
            tl.store(y + column, result.to(dtype), mask=inside)


@triton.jit
def norm_rows(
    x, y, y_scale, gain, offset,
    M, x_stride, eps, padding,
    D: tl.constexpr,
    MODULATED: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """`norm` of whole rows, which are read once, quantised with a scale per row: y [M, D] in int8 or e4m3, y_scale [M]."""
    width: tl.constexpr = VALUES // ROWS
    dtype = x.dtype.element_ty
    pieces = load_rows(x, M, x_stride, D, ROWS, VALUES)
    column = tl.arange(0, width)[None, :]
    sums = tl.zeros((ROWS, width), tl.float32)
    for index in tl.static_range((D + width - 1) // width):
        sums += pieces[index]
    mean = tl.sum(sums, 1, keep_dims=True) * (1.0 / D)
    squares = tl.zeros((ROWS, width), tl.float32)
    for index in tl.static_range((D + width - 1) // width):
        distance = tl.where(column < D - index * width, pieces[index] - mean, 0.0)
        squares += distance * distance
    scale = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) * (1.0 / D) + padding * mean * mean + eps)

    results = ()
    for index in tl.static_range((D + width - 1) // width):
        inside = column < D - index * width
        factor = tl.load(gain + index * width + column, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(offset + index * width + column, mask=inside, other=0.0).to(tl.float32)
        result = (pieces[index] - mean) * scale
        if MODULATED:
            result = rounded(result, dtype) * (1.0 + factor) + shift
        else:
            result = result * factor + shift
        results = results + (tl.where(inside, rounded(result, dtype), 0.0),)  # noqa: RUF005  Triton unpacks no tuple
    store_quantised(results, y, y_scale, M, D, ROWS, VALUES)
