"""Kernels of the W8A8 linear. Letters: M rows, N outputs, K inputs. With scales by tile, a block of the product is one
tile, so that each operand has one scale per slab of K."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import TILE, load_rows, quantise_tile, rounded, store_quantised

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
    """The index of a program's weight, and the row and column of its tile. Programs that run at the same time share GROUP
    tiles of rows, so that both operands come from the cache."""
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = row_tiles * column_tiles
    which, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first_row = tile // (GROUP * column_tiles) * GROUP
    group = tl.minimum(row_tiles - first_row, GROUP)
    row_tile = first_row + tile % (GROUP * column_tiles) % group
    return which, row_tile, tile % (GROUP * column_tiles) // group


@triton.jit
def finish(
    total, row, column, bias, residual, gate, y, y_scale,
    M, N,
    GELU: tl.constexpr,
):  # fmt: skip
    """Apply bias, GELU, gate and residual to a product in registers, and store it. `total` is the tile that starts at
    `row` and `column`; the bias has the compute type, to which the reference rounds."""
    rows = tl.arange(0, total.shape[0])[:, None]
    columns = tl.arange(0, total.shape[1])
    is_column = columns < N - column
    inside = (rows < M - row) & is_column[None, :]
    compute = bias.dtype.element_ty
    offset = tl.load(bias + column + columns, mask=is_column, other=0.0)[None, :]
    total = rounded(rounded(total, compute) + offset.to(tl.float32), compute)
    if GELU:
        total = rounded(gelu(total), compute)
    start = row.to(tl.int64) * N + column
    place = rows * N + columns[None, :]
    if residual is not None:
        if gate is not None:
            factor = tl.load(gate + column + columns, mask=is_column, other=0.0)[None, :]
            total = rounded(total * rounded(factor, compute), compute)
        total += tl.load(residual + start + place, mask=inside, other=0.0).to(tl.float32)
    if y_scale is not None:
        # Rows past the last one repeat it, so they do not change the largest magnitude of a tile.
        steps, step = quantise_tile(total)
        tl.store(y + start + place, steps, mask=inside)
        tl.store(y_scale + (row // TILE).to(tl.int64) * (N // TILE) + column // TILE, step)
    else:
        tl.store(y + start + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gemm(
    x, x_scale,
    weight_0, weight_1, weight_2,
    scale_0, scale_1, scale_2,
    bias_0, bias_1, bias_2,
    y_0, y_1, y_2,
    y_scale, residual, gate,
    M, N,
    K: tl.constexpr,
    GELU: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Multiply int8 x [M, K] by one to three int8 weights [N, K], with scales by tile of 128x128, which is also the block.

    y_i is [M, N]. With `y_scale`, y is quantised; with `residual` [M, N] and `gate` [N], y becomes residual + y * gate.
    Code for arguments that are None is not compiled.
    """
    which, row_tile, column_tile = place_of(M, N, BLOCK_M, BLOCK_N, GROUP)
    weight, scale = pick(which, weight_0, weight_1, weight_2, WEIGHTS), pick(which, scale_0, scale_1, scale_2, WEIGHTS)
    bias, y = pick(which, bias_0, bias_1, bias_2, WEIGHTS), pick(which, y_0, y_1, y_2, WEIGHTS)

    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    slab = tl.arange(0, TILE)
    # A ragged tile reads its last row again instead of using a mask: values outside are never stored.
    x_tile = x + row.to(tl.int64) * K + (tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row)[:, None] * K + slab[None, :])
    w_tile = weight + column.to(tl.int64) * K + (tl.arange(0, BLOCK_N)[None, :] * K + slab[:, None])
    x_scale += row_tile.to(tl.int64) * (K // TILE)
    scale += column_tile.to(tl.int64) * (K // TILE)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(K // TILE):
        product = tl.dot(tl.load(x_tile + k * TILE), tl.load(w_tile + k * TILE), out_dtype=tl.int32)
        total = tl.fma(product.to(tl.float32), tl.load(x_scale + k) * tl.load(scale + k), total)
    finish(total, row, column, bias, residual, gate, y, y_scale, M, N, GELU)


@triton.jit
def gemm_rows(
    x, x_scale,
    weight_0, weight_1, weight_2,
    scale_0, scale_1, scale_2,
    bias_0, bias_1, bias_2,
    y_0, y_1, y_2,
    y_scale, residual, gate,
    M, N,
    K: tl.constexpr,
    GELU: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """`gemm` with scales by row, x_scale [M] and scale_i [N]: all of K is summed in integers and rescaled once."""
    which, row_tile, column_tile = place_of(M, N, BLOCK_M, BLOCK_N, GROUP)
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
    finish(total.to(tl.float32) * factor, row, column, bias, residual, gate, y, y_scale, M, N, GELU)


@triton.jit
def gelu_quantise_rows(x, y, y_scale, M, x_stride, K: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr):
    """`quantise_rows` of GELU of x [M, K], for products that a library computes."""
    pieces = load_rows(x, M, x_stride, K, ROWS, VALUES)
    results = ()
    for index in tl.static_range((K * ROWS + VALUES - 1) // VALUES):
        results = results + (rounded(gelu(pieces[index]), x.dtype.element_ty),)  # noqa: RUF005  Triton unpacks no tuple
    store_quantised(results, y, y_scale, M, K, ROWS, VALUES)
