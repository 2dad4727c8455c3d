"""The kernel that writes the input of a convolution of the VAE: the frames of the past, then the sum of the residual
stream and a branch, normalised and activated."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import whole_steps

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def where(is_wanted, count):
    """A count, or zero. Triton's interpreter does not combine conditions of numbers with those of tensors."""
    return tl.where(is_wanted, count, 0)


@triton.jit
def join(
    x, branch, weight, steps, past, total, joined, kept,
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
    the sum itself, and `kept` [PAST, N, C] the last frames of `joined`. With `steps` [C], how many steps of int8 a
    difference of one is, `past`, `joined` and `kept` are int8. Whatever is None is left out. If FOLDED, x is
    [T, N / width / 2 + 1, width / 2 + 1, 4, C], the result of a convolution of single pixels with a folded weight.

    A program has some positions of one new frame, with all of their channels, and of one frame of the past, if there
    are so many of them.
    """
    frame = tl.program_id(1)
    position = tl.program_id(0) * (BLOCK // LANES) + tl.arange(0, BLOCK // LANES)[:, None]
    channel = tl.arange(0, LANES)
    lane = channel[None, :]
    inside = lane < C
    is_past, is_new = inside & (position < where(frame < PAST, N)), inside & (position < where(frame < T, N))
    within = position.to(tl.int64) * C + lane
    size = N.to(tl.int64) * C
    at = frame * size + within

    before = tl.zeros((BLOCK // LANES, LANES), x.dtype.element_ty if steps is None else tl.int8)
    if past is not None:
        before = tl.load(past + at, mask=is_past, other=0.0)
    if FOLDED:
        row, column = position // width, position % width
        source = frame * (N // width // 2 + 1) + (row + 1) // 2
        source = source.to(tl.int64) * (width // 2 + 1) + (column + 1) // 2
        quarter = row % 2 * 2 + column % 2
        values = tl.load(x + (source * 4 + quarter) * C + lane, mask=is_new, other=0.0)
    else:
        values = tl.load(x + at, mask=is_new, other=0.0)
    dtype = values.dtype
    if branch is not None:
        other = tl.load(branch + at, mask=is_new, other=0.0).to(tl.float32)
        values = (values.to(tl.float32) + other).to(dtype)
    if total is not None:
        tl.store(total + at, values, mask=is_new)
    if weight is not None:
        # As a row, the weights would be given a layout of their own, into which all values would be converted.
        gain = tl.load(weight + channel, mask=channel < C, other=0.0)[None, :].to(tl.float32)
        exact = values.to(tl.float32)
        # One over the norm, which counts as at least 1e-12.
        shrink = tl.rsqrt(tl.maximum(tl.sum(exact * exact, 1, keep_dims=True), 1e-24))
        values = (exact * (shrink * C**0.5) * gain).to(dtype)
        if ACTIVATES:
            exact = values.to(tl.float32)
            # The square of this is the sigmoid; a reciprocal would take several instructions.
            root = tl.rsqrt(1.0 + tl.exp2(tl.minimum(exact * -LOG2_E, 126.0)))
            values = (exact * root * root).to(dtype)
    if steps is not None:
        per_unit = tl.load(steps + channel, mask=channel < C, other=0.0)[None, :]
        values = whole_steps(tl.minimum(tl.maximum(values.to(tl.float32) * per_unit, -127.0), 127.0))

    if joined is not None:
        if PAST:
            tl.store(joined + at, before, mask=is_past)
        tl.store(joined + PAST * size + at, values, mask=is_new)
    if kept is not None:
        is_last_past = is_past & (position < where(frame >= T, N))
        tl.store(kept + (at - T * size), before, mask=is_last_past)
        is_last_new = is_new & (position < where(frame >= T - PAST, N))
        tl.store(kept + (at + (PAST - T) * size), values, mask=is_last_new)
