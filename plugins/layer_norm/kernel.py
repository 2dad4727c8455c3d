"""The kernel of layer norm, with plain weights or a timestep's modulation, and optionally with 8-bit output."""

import triton
import triton.language as tl

from wanforge.plugins.block_quantiser.kernel import store_blocks
from wanforge.plugins.quantiser.kernel import TILE, load_rows, quantise_tile, rounded, store_quantised
from wanforge.plugins.row_moments.kernel import mean_and_variance


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
        result = affine((values - mean) * scale, gain + column + lane, offset + column + lane, dtype, MODULATED)
        # Threads take as many neighbours at a time as they store. With 16, they read x, gain and offset, which lie in shared
        # memory, from the same banks.
        place = tl.max_contiguous(y + column, (1, 8))
        store_tile(result, inside, place, y_scale, column // TILE, D, dtype)


@triton.jit
def affine(normalised, gain, offset, dtype: tl.constexpr, MODULATED: tl.constexpr):
    """Multiply normalised values by what `gain` points to, and add what `offset` points to."""
    factor, shift = tl.load(gain).to(tl.float32), tl.load(offset).to(tl.float32)
    if MODULATED:
        return rounded(normalised, dtype) * (1.0 + factor) + shift
    else:
        return normalised * factor + shift


@triton.jit
def store_tile(result, inside, y, y_scale, tile, D: tl.constexpr, dtype: tl.constexpr):
    """Store a tile of the program's rows, quantised if `y_scale` is given."""
    if y_scale is not None:
        steps, step = quantise_tile(tl.where(inside, rounded(result, dtype), 0.0))
        tl.store(y, steps, mask=inside)
        tl.store(y_scale + tl.program_id(0).to(tl.int64) * (D // TILE) + tile, step)
    else:
        tl.store(y, result.to(dtype), mask=inside)


@triton.jit
def norm_measured(
    x, y, y_scale, gain, offset, moments,
    M, x_stride, eps, padding,
    D: tl.constexpr,
    MODULATED: tl.constexpr,
    TILES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`norm` of rows whose moments [2, D/128, M] are known. A program has at most TILES tiles, and fewer
    where that leaves the GPU with fewer than PROGRAMS programs."""
    first, part, parts = tl.program_id(0).to(tl.int64) * TILE, tl.program_id(1), tl.num_programs(1)
    row, lane = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    inside = row < M - first
    x += first * x_stride + (row * x_stride + lane)
    y += first * D + (row * D + lane)
    mean, variance = mean_and_variance(moments, tl.program_id(0) * TILE + tl.arange(0, TILE), M, D // TILE)
    scale = tl.rsqrt(variance + padding * mean * mean + eps)[:, None]
    mean = mean[:, None]
    left, right = part * (D // TILE) // parts, (part + 1) * (D // TILE) // parts
    for tile in tl.range(left, right, num_stages=STAGES, disable_licm=True):
        values = tl.load(x + tile * TILE, mask=inside, other=0.0).to(tl.float32)
        column = lane + tile * TILE
        result = affine((values - mean) * scale, gain + column, offset + column, x.dtype.element_ty, MODULATED)
        place = tl.max_contiguous(y + tile * TILE, (1, 8))  # as in `norm`
        store_tile(result, inside, place, y_scale, tile, D, x.dtype.element_ty)


@triton.jit
def norm_rows(
    x, y, y_scale, gain, offset,
    M, x_stride, eps, padding,
    D: tl.constexpr,
    MODULATED: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """`norm` of whole rows, which are read once, quantised with a scale per row: y [M, D] in int8 or e4m3, y_scale [M]; or
    to NVFP4: y [M, D/2], two numbers in a byte, y_scale [M, D/16]."""
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
    if y.dtype.element_ty == tl.uint8:
        for index in tl.static_range((D + width - 1) // width):
            store_blocks(results[index], y, y_scale, tl.program_id(0) * ROWS, index * width, M, D, dtype)
    else:
        store_quantised(results, y, y_scale, M, D, ROWS, VALUES)
