"""Kernels of the W8A8 linear. Letters: M rows, N outputs, K inputs. With scales by tile, a block of the product is one
tile, so that each operand has one scale per slab of K."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import (
    ROUND,
    TILE,
    largest,
    load_rows,
    rounded,
    store_quantised,
    tile_scale,
    tile_steps,
)
from wanforge.plugins.row_moments.kernel import store_moments

# 2 sqrt(2 / pi) log2(e), and that times 0.044715.
GELU_LINEAR = tl.constexpr(2.302208198144325)
GELU_CUBIC = tl.constexpr(0.1029432395800235)


@triton.jit
def gelu(x):
    """GELU by its tanh approximation, written with one exponential: x * sigmoid(2u)."""
    exponent = x * tl.fma(x * x, -GELU_CUBIC, -GELU_LINEAR)
    return x / (1.0 + tl.exp2(tl.minimum(exponent, 115.0)))


@triton.jit
def pick(which, first, second, third, WEIGHTS: tl.constexpr):
    """Select one of up to three pointers; those beyond WEIGHTS are None."""
    chosen = first
    if WEIGHTS > 1:
        if which == 1:
            chosen = second
    if WEIGHTS > 2:
        if which == 2:
            chosen = third
    return chosen


@triton.jit
def place_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The row and column of a program's tile. Programs that run at the same time share GROUP tiles of rows, so that both
    operands come from the cache."""
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first_row = tile // (GROUP * column_tiles) * GROUP
    group = tl.minimum(row_tiles - first_row, GROUP)
    row_tile = first_row + tile % (GROUP * column_tiles) % group
    return row_tile, tile % (GROUP * column_tiles) // group


@triton.jit
def finish(
    totals, row, column, bias, residual, gate, y, y_scale, moments,
    M, N,
    GELU: tl.constexpr,
):  # fmt: skip
    """Apply bias, GELU, gate and residual to a product in registers, and store it. `totals` are the parts, one below the
    other, of the tile that starts at `row` and `column`; the bias has the compute type, to which the reference rounds.
    With `moments`, those of the rows are stored as well."""
    PART: tl.constexpr = totals[0].shape[0]
    amax = 0.0
    finished = ()
    for part in tl.static_range(len(totals)):
        total = epilogue(totals[part], row + part * PART, column, bias, residual, gate, M, N, GELU)
        if y_scale is not None:
            amax = tl.maximum(amax, largest(total))
        finished = finished + (total,)  # noqa: RUF005  Triton unpacks no tuple
    for part in tl.static_range(len(totals)):
        total = finished[part]
        start, place, inside = place_in(total, row + part * PART, column, M, N)
        if y_scale is not None:
            tl.store(y + start + place, tile_steps(total, amax), mask=inside)
        else:
            tl.store(y + start + place, total.to(y.dtype.element_ty), mask=inside)
            if moments is not None:
                store_moments(rounded(total, y.dtype.element_ty), moments, row + part * PART, column, M, N)
    if y_scale is not None:
        tl.store(y_scale + (row // TILE).to(tl.int64) * (N // TILE) + column // TILE, tile_scale(amax))


@triton.jit
def place_in(total, row, column, M, N):
    """Where a part of a product that starts at `row` and `column` lies in [M, N]: its start, the places of its values from
    there, and whether they are inside. A part that starts past the last row has none inside."""
    rows = tl.arange(0, total.shape[0])[:, None]
    columns = tl.arange(0, total.shape[1])[None, :]
    return row.to(tl.int64) * N + column, rows * N + columns, (rows < M - row) & (columns < N - column)


@triton.jit
def epilogue(total, row, column, bias, residual, gate, M, N, GELU: tl.constexpr):
    """Apply bias, GELU, gate and residual to a part of a product. Rows past the last one stay repetitions of it, so they
    do not change the largest magnitude of a tile."""
    start, place, inside = place_in(total, row, column, M, N)
    columns = tl.arange(0, total.shape[1])
    is_column = columns < N - column
    compute = bias.dtype.element_ty
    offset = tl.load(bias + column + columns, mask=is_column, other=0.0)[None, :]
    total = rounded(rounded(total, compute) + offset.to(tl.float32), compute)
    if GELU:
        total = rounded(gelu(total), compute)
    if residual is not None:
        if gate is not None:
            factor = tl.load(gate + column + columns, mask=is_column, other=0.0)[None, :]
            total = rounded(total * rounded(factor, compute), compute)
        total += tl.load(residual + start + place, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def gemm(
    x, x_scale,
    weight_0, weight_1, weight_2,
    scale_0, scale_1, scale_2,
    bias_0, bias_1, bias_2,
    y_0, y_1, y_2,
    y_scale, residual, gate, moments,
    M, N,
    K: tl.constexpr,
    GELU: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    SHIFTED: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Multiply int8 x [M, K] by one to three int8 weights [N, K], with scales by tile of 128x128, which is also the block.

    y_i is [M, N]. With `y_scale`, y is quantised; with `residual` [M, N] and `gate` [N], y becomes residual + y * gate;
    `moments` [2, N/128, M] receive those of the rows of the only y. Code for arguments that are None is not compiled.
    """
    which = tl.program_id(1)
    row_tile, column_tile = place_of(M, N, BLOCK_M, BLOCK_N, GROUP)
    weight, scale = pick(which, weight_0, weight_1, weight_2, WEIGHTS), pick(which, scale_0, scale_1, scale_2, WEIGHTS)
    bias, y = pick(which, bias_0, bias_1, bias_2, WEIGHTS), pick(which, y_0, y_1, y_2, WEIGHTS)

    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    PART: tl.constexpr = BLOCK_M // PARTS
    slab = tl.arange(0, TILE)
    x += row.to(tl.int64) * K
    weight += column.to(tl.int64) * K
    x_scale += row_tile.to(tl.int64) * (K // TILE)
    scale += column_tile.to(tl.int64) * (K // TILE)
    factor = tl.load(x_scale) * tl.load(scale)
    totals = ()
    for _ in tl.static_range(PARTS):
        totals = totals + (tl.zeros((PART, BLOCK_N), tl.float32),)  # noqa: RUF005  Triton unpacks no tuple
    # Addresses that are worked out once for all slabs would take more registers than there are.
    for k in tl.range(K // TILE, disable_licm=True):
        w_slab = tl.load(weight + ((tl.arange(0, BLOCK_N) * K + k * TILE)[None, :] + slab[:, None]))
        sums = ()
        for part in tl.static_range(PARTS):
            # A ragged tile reads its last row again instead of using a mask: values outside are never stored.
            x_rows = tl.minimum(part * PART + tl.arange(0, PART), M - 1 - row)[:, None] * K + k * TILE
            product = dot(tl.load(x + (x_rows + slab[None, :])), w_slab, SHIFTED)
            sums = sums + (tl.fma(product, factor, totals[part]),)  # noqa: RUF005  Triton unpacks no tuple
        totals = sums
        # Loads return in order, so the next scales are asked for ahead of the tiles that come after them.
        ahead = tl.minimum(k + 1, K // TILE - 1)
        factor = tl.load(x_scale + ahead) * tl.load(scale + ahead)
    finish(totals, row, column, bias, residual, gate, y, y_scale, moments, M, N, GELU)


@triton.jit
def dot(x, w, SHIFTED: tl.constexpr):
    """The product of two int8 slabs as float32, exactly: its sums are at most 2^21 in magnitude.

    An integer of less than 2^22 that is added to the bits of `ROUND`, whose last bit counts one, is added to the number.
    So a sum that starts there needs a subtraction in place of a conversion, which takes twice as long. `mma.sync` reads
    its start from any register; `wgmma` would need it written for every slab.
    """
    if SHIFTED:
        start = tl.full((x.shape[0], w.shape[1]), ROUND, tl.float32).to(tl.int32, bitcast=True)
        return tl.dot(x, w, start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - ROUND
    return tl.dot(x, w, out_dtype=tl.int32).to(tl.float32)


@triton.jit
def gemm_rows(
    x, x_scale,
    weight_0, weight_1, weight_2,
    scale_0, scale_1, scale_2,
    bias_0, bias_1, bias_2,
    y_0, y_1, y_2,
    y_scale, residual, gate, moments,
    M, N,
    K: tl.constexpr,
    GELU: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """`gemm` with scales by row, x_scale [M] and scale_i [N]: all of K is summed in integers and rescaled once."""
    which = tl.program_id(1)
    row_tile, column_tile = place_of(M, N, BLOCK_M, BLOCK_N, GROUP)
    weight, scale = pick(which, weight_0, weight_1, weight_2, WEIGHTS), pick(which, scale_0, scale_1, scale_2, WEIGHTS)
    bias, y = pick(which, bias_0, bias_1, bias_2, WEIGHTS), pick(which, y_0, y_1, y_2, WEIGHTS)

    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    slab = tl.arange(0, TILE)
    rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row)
    columns = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - column)
    x_tile = x + row.to(tl.int64) * K + (rows[:, None] * K + slab[None, :])
    w_tile = weight + column.to(tl.int64) * K + (columns[None, :] * K + slab[:, None])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(K // TILE):
        total = tl.dot(tl.load(x_tile + k * TILE), tl.load(w_tile + k * TILE), total, out_dtype=tl.int32)
    factor = tl.load(x_scale + row + rows)[:, None] * tl.load(scale + column + columns)[None, :]
    finish((total.to(tl.float32) * factor,), row, column, bias, residual, gate, y, y_scale, moments, M, N, GELU)


@triton.jit
def gelu_quantise_rows(x, y, y_scale, M, x_stride, K: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr):
    """`quantise_rows` of GELU of x [M, K], for products that a library computes."""
    pieces = load_rows(x, M, x_stride, K, ROWS, VALUES)
    results = ()
    for index in tl.static_range((K * ROWS + VALUES - 1) // VALUES):
        results = results + (rounded(gelu(pieces[index]), x.dtype.element_ty),)  # noqa: RUF005  Triton unpacks no tuple
    store_quantised(results, y, y_scale, M, K, ROWS, VALUES)
