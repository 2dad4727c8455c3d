"""The number formats of a GPU on numpy arrays: rounding to the bit, and instructions that are only approximate."""

from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
E4M3_MOST = 448.0


class Approximation(Enum):
    """What an approximate instruction returns: the number nearest to the exact result, or the least or greatest one
    that its documented error allows."""

    NEAREST = 0
    LEAST = -1
    GREATEST = 1


EX2_ERROR = 2.0**-22
"""The largest relative error of ``ex2.approx`` (PTX ISA, floating-point instructions)."""
RSQRT_ERROR = 2.0**-22.9
"""The largest relative error of ``rsqrt.approx`` (PTX ISA, floating-point instructions)."""
RCP_ERROR = 2.0**-23
"""The largest relative error of ``rcp.approx`` (PTX ISA, floating-point instructions)."""
DIV_FULL_ULP = 2.0
"""The largest error of ``div.full`` in units in the last place (PTX ISA, floating-point instructions)."""


def exact_product_sum(a: Array, b: Array, c: Array) -> Array:
    """a * b + c for numbers of at most 24 bits, as a float64 that is rounded to odd, so that rounding it again to
    float32 or fewer bits gives the correctly rounded result."""
    product = a.astype(np.float64) * b.astype(np.float64)
    return _rounded_to_odd(product, c.astype(np.float64))


def exact_sum(a: Array, b: Array) -> Array:
    """a + b as a float64 that is rounded to odd."""
    return _rounded_to_odd(a.astype(np.float64), b.astype(np.float64))


def _rounded_to_odd(a: Array, b: Array) -> Array:
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    nudge = np.isfinite(total) & np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    if not nudge.any():
        return total
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(nudge, bits + step, bits).view(np.float64)


def fma(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f32."""
    return exact_product_sum(a, b, c).astype(np.float32)


def to_bf16(x: Array) -> Array:
    """The bits of x rounded to bfloat16, halves to even. A float64 has to be rounded to odd."""
    if x.dtype == np.float64:
        x = _float32_to_odd(x)
    bits = x.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _float32_to_odd(x: Array) -> Array:
    near = x.astype(np.float32)
    error = x - near.astype(np.float64)
    bits = near.view(np.int32)
    step = np.where((error > 0) == (near > 0), 1, -1).astype(np.int32)
    nudge = np.isfinite(near) & (error != 0) & (bits & 1 == 0)
    return np.where(nudge, bits + step, bits).view(np.float32)


def cut_off(x: Array) -> Array:
    """Float64 x as float32, rounded towards zero."""
    near = x.astype(np.float32)
    return np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_f16(x: Array, *, towards_zero: bool = False) -> Array:
    """The bits of float32 x as float16, rounded to nearest or towards zero."""
    with np.errstate(over="ignore"):
        near = x.astype(np.float16)
    if not towards_zero:
        return near.view(np.uint16)
    bits = near.view(np.uint16)
    too_large = np.isfinite(x) & (np.abs(near.astype(np.float32)) > np.abs(x))
    return np.where(too_large, bits - 1, bits).astype(np.uint16)


def _e4m3_values() -> Array:
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)


E4M3 = _e4m3_values()
"""The numbers of the codes 0 to 126, which are ascending."""
E4M3_BY_CODE = np.concatenate([E4M3, [np.nan], -E4M3, [np.nan]]).astype(np.float32)


def to_e4m3(x: Array) -> Array:
    """The codes of x in e4m3, rounded to nearest, halves to even, and clamped to the largest number."""
    size = np.minimum(np.abs(x.astype(np.float64)), E4M3_MOST)
    with np.errstate(all="ignore"):
        unit = np.exp2(np.maximum(np.floor(np.log2(np.maximum(size, 2.0**-20))), -6.0) - 3.0)
    rounded = np.rint(np.nan_to_num(size) / unit) * unit
    codes = np.searchsorted(E4M3, rounded).astype(np.uint8)
    codes = np.where(np.isnan(x), np.uint8(0x7F), codes)
    return codes | (np.signbit(x).astype(np.uint8) << 7)


def from_e4m3(codes: Array) -> Array:
    return E4M3_BY_CODE[codes]


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""The numbers of the codes 0 to 7, which are ascending."""
E2M1_BY_CODE = np.concatenate([E2M1, -E2M1])


def to_e2m1(x: Array) -> Array:
    """The codes of x in e2m1, rounded to nearest, halves to even, and clamped to the largest number, which stands for
    what is no number as well."""
    size = np.minimum(np.abs(np.nan_to_num(x, nan=np.inf)), E2M1[-1])
    unit = np.where(size < 2, np.float32(0.5), np.where(size < 4, np.float32(1), np.float32(2)))
    codes = np.searchsorted(E2M1, np.rint(size / unit) * unit).astype(np.uint8)
    return codes | (np.signbit(x) & ~np.isnan(x)).astype(np.uint8) << 3


def from_e2m1(pairs: Array) -> Array:
    """The numbers in bytes of two codes each, [..., n] to [..., 2 n], the lower half of a byte first."""
    codes = np.stack([pairs & 15, pairs >> 4], -1)
    return E2M1_BY_CODE[codes].reshape(*pairs.shape[:-1], -1)


def to_integer(x: Array, dtype: type, rounding: str) -> Array:
    """x as an integer, clamped to the range of its type; what is not a number becomes 0.

    Args:
        rounding: ``rzi`` towards zero, ``rni`` to nearest with halves to even.
    """
    whole = np.trunc(x) if rounding == "rzi" else np.rint(x)
    limits = np.iinfo(dtype)
    return np.clip(np.nan_to_num(whole.astype(np.float64)), limits.min, limits.max).astype(dtype)


def flushed(x: Array) -> Array:
    """x with subnormal numbers replaced by zeros of the same sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def ex2(x: Array, mode: Approximation, *, ftz: bool) -> Array:
    """ex2.approx."""
    exact = np.exp2((flushed(x) if ftz else x).astype(np.float64))
    result = (exact * (1.0 + mode.value * EX2_ERROR)).astype(np.float32)
    return flushed(result) if ftz else result


def rsqrt(x: Array, mode: Approximation, *, ftz: bool) -> Array:
    """rsqrt.approx."""
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = 1.0 / np.sqrt((flushed(x) if ftz else x).astype(np.float64))
        return (exact * (1.0 + mode.value * RSQRT_ERROR)).astype(np.float32)


def reciprocal(x: Array, mode: Approximation, *, ftz: bool) -> Array:
    """rcp.approx."""
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = 1.0 / (flushed(x) if ftz else x).astype(np.float64)
        result = (exact * (1.0 + mode.value * RCP_ERROR)).astype(np.float32)
    return flushed(result) if ftz else result


def divide(a: Array, b: Array) -> Array:
    """div.rn."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return a / b


def divide_full(a: Array, b: Array, mode: Approximation) -> Array:
    """div.full."""
    near = divide(a, b)
    if mode is Approximation.NEAREST:
        return near
    with np.errstate(invalid="ignore"):
        moved = near + np.float32(mode.value * DIV_FULL_ULP) * np.spacing(np.abs(near))
    return np.where(np.isfinite(near) & (near != 0), moved, near)


def maximum(a: Array, b: Array) -> Array:
    """max: of a number and what is none, the number."""
    return np.fmax(a, b)


def minimum(a: Array, b: Array) -> Array:
    """min: of a number and what is none, the number."""
    return np.fmin(a, b)
