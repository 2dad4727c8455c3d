"""The kernel that quantises a matrix to NVFP4, and functions with which other kernels quantise values in registers."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import INTERPRETED, ROUND, TILE, to_e4m3

BLOCK = tl.constexpr(16)
INPUT_SCALE = tl.constexpr(0.25)
LARGEST = tl.constexpr(6.0)
LEAST_RATIO = tl.constexpr(0.0009765625)
"""Half of the smallest e4m3. No larger number rounds to zero."""
NOT_A_NUMBER = tl.constexpr(0x7F)
"""In e4m3."""
SNAP = tl.constexpr(48.0)
"""Adding and subtracting this rounds numbers of less than 16 in magnitude to multiples of 2^-18."""

RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
"""At most one unit in the last place away; subnormal numbers are zeros."""
TO_E2M1 = tl.constexpr("""{
        .reg .b8 first, second, third, fourth;
        cvt.rn.satfinite.e2m1x2.f32 first, $5, $1;
        cvt.rn.satfinite.e2m1x2.f32 second, $6, $2;
        cvt.rn.satfinite.e2m1x2.f32 third, $7, $3;
        cvt.rn.satfinite.e2m1x2.f32 fourth, $8, $4;
        mov.b32 $0, {first, second, third, fourth};
        }""")
"""Four pairs of float32 to four bytes of two 4-bit floats, rounded to nearest even and clamped to their range."""


@triton.jit
def largest(x):
    """The largest magnitudes along the last axis, found by their bits, among which what is not a number prevails."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, len(x.shape) - 1).to(tl.float32, bitcast=True)


@triton.jit
def block_scale(amax, dtype: tl.constexpr):
    """The scales of blocks, in e4m3, given their largest magnitudes in `dtype`."""
    if dtype == tl.float32:
        ratio = tl.math.div_rn(amax, LARGEST * INPUT_SCALE)
    else:
        # A ratio of a 16-bit float is halfway between two scales, which have four bits, or at least 2^-12 of it away from
        # there. Where it is halfway, the product is the ratio itself.
        ratio = amax * (1.0 / (LARGEST * INPUT_SCALE))
    ratio = tl.where(ratio <= LEAST_RATIO, 1.0, ratio)
    if INTERPRETED:  # there, `to_e4m3` takes finite numbers only
        bits = to_e4m3(tl.minimum(ratio, 448.0)).to(tl.uint8, bitcast=True)
        return tl.where(ratio == ratio, bits, NOT_A_NUMBER).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return to_e4m3(ratio)


@triton.jit
def quotients(x, divisor, dtype: tl.constexpr):
    """x / divisor, for x in `dtype`, as far as rounding it to 4 bits depends on it. A zero has no sign in 16 bits.

    The bounds between two 4-bit floats have at most three significant bits, and so a quotient of 16-bit floats by a
    divisor of four bits is such a bound or at least 2^-13 away from it. Where it is one, multiplying by the reciprocal is
    off by less than 2^-20.
    """
    if dtype == tl.float32:
        return tl.math.div_rn(x, divisor)
    return tl.fma(x, reciprocal(divisor), SNAP) - SNAP


@triton.jit
def reciprocal(x):
    """1 / x, where neither is subnormal, and at most one unit in the last place away."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(RECIPROCAL, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def packed(low, high):
    """Pairs of numbers, rounded to 4-bit floats, as bytes with the first of two in the lower half."""
    if INTERPRETED:
        return (code(low) | (code(high) << 4)).to(tl.uint8)
    return tl.inline_asm_elementwise(
        TO_E2M1,
        "=r,f,f,f,f,f,f,f,f",
        [low, high],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def code(x):
    """The four bits of the 4-bit float that is nearest to x, halves to even."""
    magnitude = tl.minimum(tl.abs(x), LARGEST)
    step = tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))
    steps = ((magnitude / step + ROUND) - ROUND).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return sign + steps + tl.where(magnitude < 2.0, 0, tl.where(magnitude < 4.0, 2, 4))


@triton.jit
def store_blocks(x, y, y_scale, row, column, M, N, dtype: tl.constexpr):
    """Quantise a part of a matrix [M, N] that starts at `row` and `column`, in float32 and rounded to `dtype`, and store
    it in y [M, N/2] and y_scale [M, N/16]. What lies outside must be finite."""
    ROWS: tl.constexpr = x.shape[0]
    BLOCKS: tl.constexpr = x.shape[1] // BLOCK
    blocks = tl.reshape(x, (ROWS, BLOCKS, BLOCK))
    scale = block_scale(largest(blocks), dtype)
    divisor = scale.to(tl.float32) * INPUT_SCALE
    numbers = quotients(blocks, divisor[:, :, None], dtype)
    low, high = tl.split(tl.reshape(numbers, (ROWS, BLOCKS * BLOCK // 2, 2)))
    rows, first = tl.arange(0, ROWS)[:, None], row.to(tl.int64)
    pair, block = tl.arange(0, BLOCKS * BLOCK // 2)[None, :], tl.arange(0, BLOCKS)[None, :]
    inside = rows < M - row
    y += first * (N // 2) + column // 2
    y_scale += first * (N // BLOCK) + column // BLOCK
    tl.store(y + (rows * (N // 2) + pair), packed(low, high), mask=inside & (pair < (N - column) // 2))
    tl.store(y_scale + (rows * (N // BLOCK) + block), scale, mask=inside & (block < (N - column) // BLOCK))


@triton.jit
def quantise(x, y, y_scale, M, x_stride, K: tl.constexpr, ROWS: tl.constexpr):
    """Quantise x [M, K] to 4-bit floats y [M, K/2], two in a byte, and y_scale [M, K/16]."""
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * TILE
    rows = tl.arange(0, ROWS)[:, None]
    x += row.to(tl.int64) * x_stride + column + (rows * x_stride + tl.arange(0, TILE)[None, :])
    values = tl.load(x, mask=rows < M - row, other=0.0)
    store_blocks(values.to(tl.float32), y, y_scale, row, column, M, K, x.dtype.element_ty)
