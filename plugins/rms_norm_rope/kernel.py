"""The kernel of RMS norm over all heads and of the rotary embedding, for queries and keys in one launch."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import rounded

HEAD = tl.constexpr(128)


@triton.jit
def norm(
    x_0, x_1, weight_0, weight_1, cos, sin,
    M, x_stride, eps,
    D: tl.constexpr,
    TENSORS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise x_i [M, D] over D in place and multiply by weight_i [D]; then, if `cos` and `sin` [M, 64] are given,
    rotate adjacent channels of each head by their angle. The second axis of the grid selects i."""
    x, weight = x_0, weight_0
    if TENSORS == 2:
        if tl.program_id(1) == 1:
            x, weight = x_1, weight_1
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, HEAD)[None, :]
    pair = tl.arange(0, HEAD // 2)[None, :]
    inside = rows < M
    dtype = x.dtype.element_ty
    x += rows * x_stride + lane

    squares = tl.zeros((ROWS, 1), tl.float32)
    for column in range(0, D, HEAD):
        values = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(values * values, 1, keep_dims=True)
    scale = tl.rsqrt(squares * (1.0 / D) + eps)

    if cos is not None:
        cosine = tl.load(cos + rows * (HEAD // 2) + pair, mask=inside, other=0.0)
        sine = tl.load(sin + rows * (HEAD // 2) + pair, mask=inside, other=0.0)
    for column in range(0, D, HEAD):
        values = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(weight + column + lane).to(tl.float32)
        result = rounded(values * scale * factor, dtype)
        if cos is not None:
            even, odd = tl.split(tl.reshape(result, (ROWS, HEAD // 2, 2)))
            turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
            result = tl.reshape(turned, (ROWS, HEAD))
        tl.store(x + column, result.to(dtype), mask=inside)
