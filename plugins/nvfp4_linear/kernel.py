"""The kernel of the NVFP4 linear. Letters: M rows, N outputs, K inputs."""

import triton
import triton.language as tl

from wanforge.plugins.block_quantiser.kernel import BLOCK, INPUT_SCALE, reciprocal, store_blocks
from wanforge.plugins.quantiser.kernel import INTERPRETED, rounded
from wanforge.plugins.row_moments.kernel import store_moments
from wanforge.plugins.w8a8_linear.kernel import GELU_CUBIC, GELU_LINEAR, epilogue, pick, place_in, place_of


@triton.jit
def gemm(
    x, x_scale,
    weight_0, weight_1, weight_2,
    scale_0, scale_1, scale_2,
    global_scale_0, global_scale_1, global_scale_2,
    bias_0, bias_1, bias_2,
    y_0, y_1, y_2,
    y_scale, residual, gate, moments,
    M, N,
    K: tl.constexpr,
    GELU: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLAB: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Multiply x [M, K] by one to three weights [N, K], all in NVFP4: two numbers in a byte, [M, K/2], and scales of 16
    each, [M, K/16]. The global scale of x is `INPUT_SCALE`, that of a weight lies in memory.

    y_i is [M, N]. With `y_scale`, y is quantised to NVFP4; with `residual` [M, N] and `gate` [N], y becomes residual + y *
    gate; `moments` [2, N/128, M] receive those of the rows of the only y. Code for arguments that are None is not compiled.
    """
    which = tl.program_id(1)
    row_tile, column_tile = place_of(M, N, BLOCK_M, BLOCK_N, GROUP)
    weight, scale = pick(which, weight_0, weight_1, weight_2, WEIGHTS), pick(which, scale_0, scale_1, scale_2, WEIGHTS)
    bias, y = pick(which, bias_0, bias_1, bias_2, WEIGHTS), pick(which, y_0, y_1, y_2, WEIGHTS)
    global_scale = pick(which, global_scale_0, global_scale_1, global_scale_2, WEIGHTS)

    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    # A ragged tile reads its last row again instead of using a mask: values outside are never stored.
    rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - row)[:, None]
    columns = tl.arange(0, BLOCK_N)
    if y_scale is not None:
        columns = dealt(columns, BLOCK_N)
    columns = tl.minimum(columns, N - 1 - column)[:, None]
    pair, block = tl.arange(0, SLAB // 2)[None, :], tl.arange(0, SLAB // BLOCK)[None, :]
    x += row.to(tl.int64) * (K // 2) + (rows * (K // 2) + pair)
    weight += column.to(tl.int64) * (K // 2) + (columns * (K // 2) + pair)
    x_scale += row.to(tl.int64) * (K // BLOCK) + (rows * (K // BLOCK) + block)
    scale += column.to(tl.int64) * (K // BLOCK) + (columns * (K // BLOCK) + block)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(K // SLAB):
        x_slab, w_slab = tl.load(x + k * (SLAB // 2)), tl.load(weight + k * (SLAB // 2))
        x_factors, w_factors = tl.load(x_scale + k * (SLAB // BLOCK)), tl.load(scale + k * (SLAB // BLOCK))
        total = multiply(x_slab, x_factors, w_slab, w_factors, total)
    if y_scale is not None:
        total = gathered(total)
    total *= tl.load(global_scale) * INPUT_SCALE
    finish(total, row, column, bias, residual, gate, y, y_scale, moments, M, N, GELU)


@triton.jit
def dealt(column, BLOCK_N: tl.constexpr):
    """The order in which the columns of a tile are multiplied if its output is quantised. Of what two warps multiply side by
    side, a thread has pairs of columns that are 16 apart. In this order they are neighbours, so that a thread has whole
    blocks."""
    tile, half, pair, one = column // 16, column // 8 % 2, column // 2 % 4, column % 2
    return half * (BLOCK_N // 2) + pair * (BLOCK_N // 8) + tile * 2 + one


@triton.jit
def gathered(total):
    """A tile whose columns are in the order of `dealt` with its columns in order."""
    ROWS: tl.constexpr = total.shape[0]
    COLUMNS: tl.constexpr = total.shape[1]
    parts = tl.reshape(total, (ROWS, COLUMNS // 16, 2, 4, 2))
    return tl.reshape(tl.permute(parts, (0, 2, 3, 1, 4)), (ROWS, COLUMNS))


@triton.jit
def multiply(x, x_scale, w, w_scale, total):
    """Add the product of x [M, K] and w [N, K] to `total`. Triton's interpreter takes no scales in e4m3."""
    if INTERPRETED:
        return tl.dot(in_blocks(x, x_scale), tl.trans(in_blocks(w, w_scale)), total)
    return tl.dot_scaled(x, x_scale, "e2m1", tl.trans(w), w_scale, "e2m1", total)


@triton.jit
def in_blocks(pairs, scale):
    """The 4-bit floats in bytes [R, C/2], times the scales [R, C/16] of their blocks, as float32 [R, C]."""
    numbers = tl.interleave(number(pairs & 15), number(pairs >> 4))
    blocks = tl.reshape(numbers, (scale.shape[0], scale.shape[1], BLOCK)) * scale.to(tl.float32)[:, :, None]
    return tl.reshape(blocks, numbers.shape)


@triton.jit
def number(bits):
    """What four bits stand for, as float32."""
    exponent, half = ((bits >> 1) & 3).to(tl.float32), (bits & 1).to(tl.float32)
    magnitude = tl.where(exponent == 0.0, 0.5 * half, (1.0 + 0.5 * half) * tl.exp2(exponent - 1.0))
    return tl.where(bits > 7, -magnitude, magnitude)


@triton.jit
def gelu(x):
    """`w8a8_linear.kernel.gelu` in fewer instructions. Where the exponential overflows, its reciprocal is zero."""
    return x * reciprocal(1.0 + exp2(x * tl.fma(x * x, -GELU_CUBIC, -GELU_LINEAR)))


@triton.jit
def exp2(x):
    """2^x; subnormal powers may be zeros."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def finish(
    total, row, column, bias, residual, gate, y, y_scale, moments,
    M, N,
    GELU: tl.constexpr,
):  # fmt: skip
    """Apply bias and either GELU or gate and residual to a tile that starts at `row` and `column`, and store it. The bias
    has the compute type, to which the reference rounds. With `moments`, those of the rows are stored as well."""
    tl.static_assert(not GELU or residual is None)
    total = epilogue(total, row, column, bias, residual, gate, M, N, False)
    if GELU:
        total = rounded(gelu(total), bias.dtype.element_ty)
    if y_scale is not None:
        store_blocks(total, y, y_scale, row, column, M, N, bias.dtype.element_ty)
    else:
        start, place, inside = place_in(total, row, column, M, N)
        tl.store(y + start + place, total.to(y.dtype.element_ty), mask=inside)
        if moments is not None:
            store_moments(rounded(total, y.dtype.element_ty), moments, row, column, M, N)
