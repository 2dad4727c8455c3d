"""Kernels that quantise a matrix, and functions with which other kernels quantise and round values in registers."""

import triton
import triton.language as tl
from triton.knobs import runtime

INTERPRETED = tl.constexpr(runtime.interpret)
TILE = tl.constexpr(128)
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, halves to even, on every machine.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def quantise_tile(x):
    """The steps and the scale of one tile, as `reference.quantise_tiles` defines them."""
    amax = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-8)
    # No step is below -128, because 128 / amax * -amax is at least the number next to it.
    return whole_steps(tl.minimum(x * tl.math.div_rn(128.0, amax), 127.0)), amax * (1.0 / 128.0)


@triton.jit
def whole_steps(x):
    """x, of at most 128 in magnitude, as int8, halves rounded to even: the last bits of its sum with `ROUND`. A conversion
    would take the slow pipe of the special functions."""
    return (x + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x rounded to `dtype`, as float32."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        # Triton rounds one value at a time here, on the slow pipe of the special functions.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 both;
            cvt.rn.bf16x2.f32 both, $3, $2;
            shl.b32 $0, both, 16;
            and.b32 $1, both, 0xffff0000;
            }""",
            "=f,=f,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return x.to(dtype).to(tl.float32)


@triton.jit
def quantise(x, y, y_scale, M, x_stride, K: tl.constexpr):
    """Quantise x [M, K] to int8 y [M, K] and y_scale [M/128, K/128]."""
    row_tile, slab = tl.program_id(0), tl.program_id(1)
    rows = row_tile.to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    columns = slab * TILE + tl.arange(0, TILE)[None, :]
    values = tl.load(x + rows * x_stride + columns, mask=rows < M, other=0.0)
    steps, scale = quantise_tile(values.to(tl.float32))
    tl.store(y + rows * K + columns, steps, mask=rows < M)
    tl.store(y_scale + row_tile.to(tl.int64) * (K // TILE) + slab, scale)


@triton.jit
def quantise_rows(x, y, y_scale, M, x_stride, K: tl.constexpr, ROWS: tl.constexpr):
    """Quantise x [M, K] to int8 y [M, K] and y_scale [M], as `reference.quantise_rows` defines them. The second read of x
    comes from the cache."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    rows = row[:, None]
    lanes = tl.arange(0, TILE)[None, :]
    x += first * x_stride + (rows * x_stride + lanes)
    y += first * K + (rows * K + lanes)
    inside = rows < M - first
    largest = tl.zeros((ROWS, TILE), tl.float32)
    for column in range(0, K, TILE):
        largest = tl.maximum(largest, tl.abs(tl.load(x + column, mask=inside, other=0.0).to(tl.float32)))
    amax = tl.maximum(tl.max(largest, 1, keep_dims=True), 1e-8)
    factor = tl.math.div_rn(127.0, amax)
    for column in range(0, K, TILE):
        values = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + column, whole_steps(values * factor), mask=inside)
    scale = tl.reshape(tl.math.div_rn(amax, 127.0), (ROWS,))
    tl.store(y_scale + first + row, scale, mask=row < M - first)
