"""The kernel of RMS norm over all heads and of the rotary embedding, for queries and keys in one launch."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import rounded

HEAD = tl.constexpr(128)


@triton.jit
def norm(
    x_0, x_1, weight_0, weight_1, cos, sin, plain_1,
    M, x_stride, eps,
    D: tl.constexpr,
    TENSORS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise x_i [M, D] over D in place and multiply by weight_i [D]; then, if `cos` and `sin` [M, 64] are given,
    rotate adjacent channels of each head by their angle. The second axis of the grid selects i. plain_1 [M, D], if it
    is given, receives x_1 as it is before it is rotated.

    Whole rows are kept in registers, in parts that a warp loads at once.
    """
    PART: tl.constexpr = min(D & -D, 8 * HEAD)
    x, weight = x_0, weight_0
    if TENSORS == 2:
        if tl.program_id(1) == 1:
            x, weight = x_1, weight_1
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, PART)[None, :]
    inside = row < M - first
    dtype = x.dtype.element_ty
    x += first * x_stride + (row * x_stride + lane)

    parts = ()
    squares = tl.zeros((ROWS, PART), tl.float32)
    for column in tl.static_range(0, D, PART):
        part = tl.load(x + column, mask=inside, other=0.0)
        parts += (part,)
        squares = tl.fma(part.to(tl.float32), part.to(tl.float32), squares)
    scale = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) * (1.0 / D) + eps)

    if cos is not None:
        pair = tl.arange(0, PART // 2)[None, :] % (HEAD // 2)
        angle = first * (HEAD // 2) + (row * (HEAD // 2) + pair)
        cosine = tl.load(cos + angle, mask=inside, other=0.0)
        sine = tl.load(sin + angle, mask=inside, other=0.0)
    for number in tl.static_range(D // PART):
        factor = tl.load(weight + number * PART + lane).to(tl.float32)
        result = rounded(parts[number].to(tl.float32) * scale * factor, dtype)
        if plain_1 is not None:
            if tl.program_id(1) == 1:
                tl.store(plain_1 + first * D + number * PART + (row * D + lane), result.to(dtype), mask=inside)
        if cos is not None:
            even, odd = tl.split(tl.reshape(result, (ROWS, PART // 2, 2)))
            turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
            result = tl.reshape(turned, (ROWS, PART))
        tl.store(x + number * PART, result.to(dtype), mask=inside)
