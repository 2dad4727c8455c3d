"""The kernel that reads remembered keys and values. Letters as in the reference."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import rounded

HEAD = tl.constexpr(128)
GROUP = tl.constexpr(64)


@triton.jit
def recall(
    keys, values, key_scale, value_scale, places, cos, sin, keys_out, values_out,
    P,
    D: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write the keys, rotated, and the values of ROWS tokens, all [P, D] or [R, D]. With scales, both are codes of 8
    bits, given as int8; with IS_FLOAT their bits are those of e4m3, as those of scales always are.

    Angles are loaded once for all heads.
    """
    PART: tl.constexpr = min(D & -D, 4 * HEAD)
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, PART)[None, :]
    place = tl.load(places + first + row, mask=row < P - first, other=-1)
    is_kept = place >= 0
    place = place.to(tl.int64)
    dtype = keys_out.dtype.element_ty

    pair = tl.arange(0, PART // 2)[None, :] % (HEAD // 2)
    angle = first * (HEAD // 2) + (row * (HEAD // 2) + pair)
    cosine = tl.load(cos + angle, mask=is_kept, other=0.0)
    sine = tl.load(sin + angle, mask=is_kept, other=0.0)

    for column in range(0, D, PART):
        here = place * D + column + lane
        there = first * D + column + (row * D + lane)
        key = number(tl.load(keys + here, mask=is_kept, other=0), IS_FLOAT)
        value = number(tl.load(values + here, mask=is_kept, other=0), IS_FLOAT)
        if key_scale is not None:
            of_key = key_scale + (place // GROUP) * D + column + lane
            of_value = value_scale + place * (D // GROUP) + (column + lane) // GROUP
            key = rounded(key * number(tl.load(of_key, mask=is_kept, other=0), True), dtype)
            value = rounded(value * number(tl.load(of_value, mask=is_kept, other=0), True), dtype)
        even, odd = tl.split(tl.reshape(key, (ROWS, PART // 2, 2)))
        turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        tl.store(keys_out + there, tl.reshape(turned, (ROWS, PART)).to(dtype), mask=is_kept)
        tl.store(values_out + there, value.to(dtype), mask=is_kept)


@triton.jit
def number(x, IS_FLOAT: tl.constexpr):
    """x as float32; with IS_FLOAT, x are the bits of e4m3.

    Without its sign, e4m3 shifted by 7 bits is a float of 16 bits that is 2^8 times too small, because its exponent
    counts from 15 instead of from 7. That holds for what is too small to be normal as well, and it needs no instruction
    for e4m3, which no GPU before sm_89 has.
    """
    if not IS_FLOAT:
        return x.to(tl.float32)
    bits = x.to(tl.int16) & 0x7F
    size = (bits << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    size = tl.where(bits == 0x7F, float("nan"), size)
    return tl.where(x < 0, -size, size)
