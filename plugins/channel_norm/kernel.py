"""The kernel that writes the input of a convolution of the VAE: the frames of the past, then the sum of the residual
stream and a branch, normalised and activated."""

import triton
import triton.language as tl


@triton.jit
def join(
    x, branch, weight, past, total, joined, kept,
    N, T, width,
    C: tl.constexpr,
    LANES: tl.constexpr,
    PAST: tl.constexpr,
    ACTIVATES: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Join `past` [PAST, N, C], or zeros, and what is computed of x + branch [T, N, C], to `joined` [PAST + T, N, C].

    With a `weight` [C] the sum is normalised over C and, with ACTIVATES, goes through SiLU. `total` [T, N, C] receives
    the sum itself, and `kept` [PAST, N, C] the last frames of `joined`. Whatever is None is left out. If FOLDED, x is
    [T, N / width / 2 + 1, width / 2 + 1, 4, C], the result of a convolution of single pixels with a folded weight.

    A program has some positions of one frame, with all of their channels.
    """
    frame = tl.program_id(1)
    position = tl.program_id(0) * (BLOCK // LANES) + tl.arange(0, BLOCK // LANES)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    inside = (position < N) & (lane < C)
    within = position.to(tl.int64) * C + lane
    size = N.to(tl.int64) * C

    dtype = x.dtype.element_ty
    values = tl.zeros((BLOCK // LANES, LANES), dtype)
    if frame < PAST:
        if past is not None:
            values = tl.load(past + frame * size + within, mask=inside, other=0.0)
    else:
        start = (frame - PAST) * size
        if FOLDED:
            row, column = position // width, position % width
            across = width // 2 + 1
            down = N // width // 2 + 1
            source = ((frame - PAST) * down + (row + 1) // 2).to(tl.int64) * across + (column + 1) // 2
            quarter = row % 2 * 2 + column % 2
            values = tl.load(x + (source * 4 + quarter) * C + lane, mask=inside, other=0.0)
        else:
            values = tl.load(x + start + within, mask=inside, other=0.0)
        if branch is not None:
            other = tl.load(branch + start + within, mask=inside, other=0.0).to(tl.float32)
            values = (values.to(tl.float32) + other).to(dtype)
        if total is not None:
            tl.store(total + start + within, values, mask=inside)
        if weight is not None:
            exact = values.to(tl.float32)
            # One over the norm, which counts as at least 1e-12.
            shrink = tl.rsqrt(tl.maximum(tl.sum(exact * exact, 1, keep_dims=True), 1e-24))
            gain = tl.load(weight + lane, mask=lane < C, other=0.0).to(tl.float32)
            values = (exact * (shrink * C**0.5) * gain).to(dtype)
            if ACTIVATES:
                exact = values.to(tl.float32)
                values = (exact * tl.sigmoid(exact)).to(dtype)
    if joined is not None:
        tl.store(joined + frame * size + within, values, mask=inside)
    if kept is not None:
        if frame >= T:
            tl.store(kept + (frame - T) * size + within, values, mask=inside)
