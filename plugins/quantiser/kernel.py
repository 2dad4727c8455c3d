"""Kernels that quantise a matrix, and functions with which other kernels quantise and round values in registers."""

import triton
import triton.language as tl
from triton.knobs import runtime

INTERPRETED = tl.constexpr(runtime.interpret)
TILE = tl.constexpr(128)
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, halves to even, on every machine.
ROUND = tl.constexpr(12582912.0)

TO_E4M3 = tl.constexpr("""{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""")
"""Four float32 to a word of e4m3, rounded to nearest even and clamped to its range."""
ROUND_TO_BFLOAT16 = tl.constexpr("""{
            .reg .b32 both;
            cvt.rn.bf16x2.f32 both, $3, $2;
            shl.b32 $0, both, 16;
            and.b32 $1, both, 0xffff0000;
            }""")
"""Two float32, each rounded to the nearest bfloat16."""


@triton.jit
def quantise_tile(x):
    """The steps and the scale of one tile, as `reference.quantise_tiles` defines them."""
    amax = largest(x)
    return tile_steps(x, amax), tile_scale(amax)


@triton.jit
def largest(x):
    """The largest magnitude of a tile, or of a part of it; at least the smallest that a tile may have."""
    return tl.maximum(tl.max(tl.abs(x)), 1e-8)


@triton.jit
def tile_steps(x, amax):
    """The steps of a tile, or of a part of it, given the largest magnitude of the whole tile."""
    # No step is below -128, because 128 / amax * -amax is at least the number next to it.
    return whole_steps(tl.minimum(x * tl.math.div_rn(128.0, amax), 127.0))


@triton.jit
def tile_scale(amax):
    """The scale of a tile, given its largest magnitude."""
    return amax * (1.0 / 128.0)


@triton.jit
def whole_steps(x):
    """x, of at most 128 in magnitude, as int8, halves rounded to even: the last bits of its sum with `ROUND`. A conversion
    would take the slow pipe of the special functions."""
    return (x + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def to_e4m3(x):
    """x in fp8, rounded to nearest even and clamped to its range.

    Triton's interpreter drops the carry of a mantissa that rounds up, so there x is rounded first and the cast is exact.
    """
    if INTERPRETED:
        exponent = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.maximum(exponent * 0.125, 0.001953125)
        return tl.clamp(((x / unit + 12582912.0) - 12582912.0) * unit, -448.0, 448.0).to(tl.float8e4nv)
    # Triton's own cast goes by way of fp16 on sm_89, which rounds twice.
    return tl.inline_asm_elementwise(
        TO_E4M3,
        "=r,f,f,f,f",
        [x],
        dtype=tl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@triton.jit
def full_scale(dtype: tl.constexpr):
    """The largest number of the steps of rows: int8, of which -128 is left out, or e4m3."""
    return 127.0 if dtype == tl.int8 else 448.0


@triton.jit
def row_steps(x, dtype: tl.constexpr):
    """x, within the full scale of `dtype`, rounded to it, and what lies halfway to the even number."""
    if dtype == tl.int8:
        return whole_steps(x)
    else:
        return to_e4m3(x)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x rounded to `dtype`, as float32."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        # Triton rounds one value at a time here, on the slow pipe of the special functions.
        return tl.inline_asm_elementwise(
            ROUND_TO_BFLOAT16,
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
def load_rows(x, M, x_stride, K: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr):
    """A program's ROWS rows of x [M, K] as float32, in pieces of VALUES values that stay in registers. What lies outside
    is zero."""
    width: tl.constexpr = VALUES // ROWS
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, width)[None, :]
    x += first * x_stride + (row * x_stride + column)
    pieces = ()
    for start in tl.static_range(0, K, width):
        inside = (row < M - first) & (column < K - start)
        pieces = pieces + (tl.load(x + start, mask=inside, other=0.0).to(tl.float32),)  # noqa: RUF005  Triton unpacks no tuple
    return pieces


@triton.jit
def store_quantised(pieces, y, y_scale, M, K: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr):
    """Quantise a program's rows, in pieces as from `load_rows`, to int8 or e4m3 y [M, K] and y_scale [M], as
    `reference.quantise_rows` defines them."""
    width: tl.constexpr = VALUES // ROWS
    dtype = y.dtype.element_ty
    largest = tl.zeros((ROWS, width), tl.float32)
    for index in tl.static_range((K + width - 1) // width):
        largest = tl.maximum(largest, tl.abs(pieces[index]))
    amax = tl.maximum(tl.max(largest, 1, keep_dims=True), 1e-8)
    factor = tl.math.div_rn(full_scale(dtype), amax)
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows, column = tl.arange(0, ROWS), tl.arange(0, width)[None, :]
    y += first * K + (rows[:, None] * K + column)
    for index in tl.static_range((K + width - 1) // width):
        inside = (rows[:, None] < M - first) & (column < K - index * width)
        tl.store(y + index * width, row_steps(pieces[index] * factor, dtype), mask=inside)
    scale = tl.reshape(tl.math.div_rn(amax, full_scale(dtype)), (ROWS,))
    tl.store(y_scale + first + rows, scale, mask=rows < M - first)


@triton.jit
def quantise_rows(x, y, y_scale, M, x_stride, K: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr):
    """Quantise x [M, K] to y [M, K] and y_scale [M], reading it once; see `store_quantised`."""
    pieces = load_rows(x, M, x_stride, K, ROWS, VALUES)
    store_quantised(pieces, y, y_scale, M, K, ROWS, VALUES)
