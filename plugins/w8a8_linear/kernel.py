"""Kernels of the W8A8 linear. Letters: M rows, N outputs, K inputs; tiles are 128x128 throughout, so that a tile of the
product has one scale per slab of K on either side."""

import triton
import triton.language as tl

TILE = tl.constexpr(128)
# Adding and taking away 1.5 * 2^23 rounds a float32 below 2^22 to an integer, halves to even, on every machine.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def quantise_tile(x):
    """Steps and scale of one tile, as `reference.quantise_tiles` defines them."""
    amax = tl.maximum(tl.max(tl.abs(x)), 1e-8)
    steps = (x * tl.math.div_rn(128.0, amax) + ROUND) - ROUND
    return tl.clamp(steps, -128.0, 127.0).to(tl.int8), amax * (1.0 / 128.0)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x as `dtype` would store it, in float32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def gelu(x):
    """GELU by its tanh approximation, written with one exponential: x * sigmoid(2u)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(tl.minimum(-2.0 * u, 80.0)))


@triton.jit
def quantise(x, y, y_scale, M, x_stride, K: tl.constexpr):
    """x [M, K] to int8 y [M, K] and y_scale [M/128, K/128]."""
    row_tile, slab = tl.program_id(0), tl.program_id(1)
    rows = row_tile.to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    columns = slab * TILE + tl.arange(0, TILE)[None, :]
    values = tl.load(x + rows * x_stride + columns, mask=rows < M, other=0.0)
    steps, scale = quantise_tile(values.to(tl.float32))
    tl.store(y + rows * K + columns, steps, mask=rows < M)
    tl.store(y_scale + row_tile.to(tl.int64) * (K // TILE) + slab, scale)


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
    GROUP: tl.constexpr,
):  # fmt: skip
    """int8 x [M, K] times one to three int8 weights [N, K], which share x. What a None leaves out is not compiled.

    y_i [M, N]; the biases [N] have the compute type, to which the reference rounds. `y_scale` asks for y quantised,
    `residual` [M, N] for residual + y * gate with `gate` [N].
    """
    row_tiles, column_tiles = tl.cdiv(M, TILE), tl.cdiv(N, TILE)
    tiles = row_tiles * column_tiles
    which, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    # Programs that run at the same time share GROUP rows of x, so that both operands come from the cache.
    first_row = tile // (GROUP * column_tiles) * GROUP
    group = tl.minimum(row_tiles - first_row, GROUP)
    row_tile = first_row + tile % (GROUP * column_tiles) % group
    column_tile = tile % (GROUP * column_tiles) // group

    weight, scale, bias, y = weight_0, scale_0, bias_0, y_0
    if WEIGHTS > 1:
        if which == 1:
            weight, scale, bias, y = weight_1, scale_1, bias_1, y_1
    if WEIGHTS > 2:
        if which == 2:
            weight, scale, bias, y = weight_2, scale_2, bias_2, y_2

    rows = row_tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = column_tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    slab = tl.arange(0, TILE)
    # A ragged tile reads its last row again instead of a mask: what lies outside is never stored.
    x_tile = x + tl.minimum(rows, M - 1)[:, None] * K + slab[None, :]
    w_tile = weight + tl.minimum(columns, N - 1)[None, :] * K + slab[:, None]
    x_scale += row_tile.to(tl.int64) * (K // TILE)
    scale += column_tile.to(tl.int64) * (K // TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for k in range(K // TILE):
        product = tl.dot(tl.load(x_tile + k * TILE), tl.load(w_tile + k * TILE), out_dtype=tl.int32)
        total += product.to(tl.float32) * (tl.load(x_scale + k) * tl.load(scale + k))

    inside = (rows < M)[:, None] & (columns < N)[None, :]
    place = rows[:, None] * N + columns[None, :]
    compute = bias.dtype.element_ty
    offset = tl.load(bias + columns, mask=columns < N, other=0.0)[None, :]
    total = rounded(rounded(total, compute) + offset.to(tl.float32), compute)
    if GELU:
        total = rounded(gelu(total), compute)
    if residual is not None:
        if gate is not None:
            factor = tl.load(gate + columns, mask=columns < N, other=0.0)[None, :]
            total = rounded(total * rounded(factor, compute), compute)
        total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if y_scale is not None:
        steps, step = quantise_tile(tl.where(inside, total, 0.0))
        tl.store(y + place, steps, mask=inside)
        tl.store(y_scale + row_tile.to(tl.int64) * column_tiles + column_tile, step)
    else:
        tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)
