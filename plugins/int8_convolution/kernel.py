"""The kernel of the convolution in int8: a product of matrices whose rows are read where the frames lie."""

import triton
import triton.language as tl


@triton.jit
def taps_inside(row, column, H, W, AROUND: tl.constexpr):
    """Which of the nine taps in a frame lie inside it, for each position, as bits."""
    bits = tl.zeros_like(row)
    for h in tl.static_range(3):
        for w in tl.static_range(3):
            above, left = row + (h - AROUND), column + (w - 1)
            is_inside = (above >= 0) & (above < H) & (left >= 0) & (left < W)
            bits |= is_inside.to(tl.int32) << (3 * h + w)
    return bits


@triton.jit
def load_slab(places, is_row, is_channel):
    """A slab of steps; zeros outside. Either mask may be None."""
    if is_channel is None:
        if is_row is None:
            return tl.load(places)
        else:
            return tl.load(places, mask=is_row, other=0)
    elif is_row is None:
        return tl.load(places, mask=is_channel, other=0)
    else:
        return tl.load(places, mask=is_row & is_channel, other=0)


@triton.jit
def finish(total, position, first, scale, bias, residual, y, N, OUTPUTS: tl.constexpr):
    """Scale the sums of a part of the outputs in a frame, add the bias and the residual, and store it."""
    dtype: tl.constexpr = y.dtype.element_ty
    output = first + tl.arange(0, total.shape[1])
    is_output = output < OUTPUTS
    factor = tl.load(scale + output, mask=is_output, other=0.0)[None, :]
    offset = tl.load(bias + output, mask=is_output, other=0.0)[None, :]
    value = tl.fma(total.to(tl.float32), factor, offset).to(dtype)
    place = position[:, None] * OUTPUTS + output[None, :]
    is_stored = (position < N)[:, None] & is_output[None, :]
    if residual is not None:
        other = tl.load(residual + place, mask=is_stored, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(dtype)
    tl.store(y + place, value, mask=is_stored)


@triton.jit
def convolve(
    x, weight, scale, bias, residual, y,
    T, H, W, N,
    C: tl.constexpr,
    OUTPUTS: tl.constexpr,
    AROUND: tl.constexpr,
    FRAMES: tl.constexpr,
    SLAB: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Convolve int8 x [2 + T, H, W, C] with an int8 weight [OUTPUTS, 27 * C], whose taps follow one another, to
    y [T, N, OUTPUTS], and add a residual of the same shape if there is one.

    There are AROUND rows of zeros above and below x, and a column of zeros beside it, so N is (H + 2 * AROUND - 2) * W.
    The sums are exact. They are multiplied by scale [OUTPUTS], and bias [OUTPUTS] is added, before y is rounded to its
    type; a residual is added after that.

    A program has ROWS // FRAMES positions in FRAMES frames, and PARTS * PART outputs of them. An iteration has one of
    the nine places of a tap in a frame and SLAB channels: what it reads of a frame is multiplied for all frames that
    see it.
    """
    POSITIONS: tl.constexpr = ROWS // FRAMES
    columns: tl.constexpr = (OUTPUTS + PARTS * PART - 1) // (PARTS * PART)
    together = columns * (T // FRAMES)
    which = tl.program_id(0) % together
    frame, first = which // columns * FRAMES, which % columns * (PARTS * PART)
    position = tl.program_id(0) // together * POSITIONS + tl.arange(0, POSITIONS)
    bits = tl.where(position < N, taps_inside(position // W, position % W, H, W, AROUND), 0)

    channel = tl.arange(0, SLAB)
    x += frame.to(tl.int64) * H * W * C
    x_place = position[:, None] * C + channel[None, :]
    w_places = ()
    totals = ()
    for part in tl.static_range(PARTS):
        # Outputs past the last one repeat it: they are never stored.
        output = tl.minimum(first + part * PART + tl.arange(0, PART), OUTPUTS - 1)
        w_places = w_places + (output[None, :] * (27 * C) + channel[:, None],)  # noqa: RUF005
    for _ in tl.static_range(FRAMES * PARTS):
        totals = totals + (tl.zeros((POSITIONS, PART), tl.int32),)  # noqa: RUF005  Triton unpacks no tuple
    SLABS: tl.constexpr = (C + SLAB - 1) // SLAB
    for k in range(9 * SLABS):
        tap, start = k // SLABS, k % SLABS * SLAB
        is_inside = (((bits >> tap) & 1) != 0)[:, None]
        away = (tap // 3 - AROUND) * W + tap % 3 - 1
        is_channel = None if C % SLAB == 0 else channel < C - start
        weights = ()
        for frames in tl.static_range(3):
            taken = (9 * frames + tap) * C + start
            for part in tl.static_range(PARTS):
                w_slab = load_slab(
                    weight + (taken + w_places[part]), None, None if is_channel is None else is_channel[:, None]
                )
                weights = weights + (w_slab,)  # noqa: RUF005
        sums = totals
        for seen in tl.static_range(FRAMES + 2):
            places = x + (((seen * H * W + away) * C + start) + x_place)
            x_slab = load_slab(places, is_inside, None if is_channel is None else is_channel[None, :])
            added = ()
            for at in tl.static_range(FRAMES):
                for part in tl.static_range(PARTS):
                    total = sums[at * PARTS + part]
                    if at <= seen and seen <= at + 2:
                        total = tl.dot(x_slab, weights[(seen - at) * PARTS + part], total, out_dtype=tl.int32)
                    added = added + (total,)  # noqa: RUF005
            sums = added
        totals = sums

    for at in tl.static_range(FRAMES):
        place = (frame + at).to(tl.int64) * N * OUTPUTS
        beside = None if residual is None else residual + place
        for part in tl.static_range(PARTS):
            total = totals[at * PARTS + part]
            finish(total, position, first + part * PART, scale, bias, beside, y + place, N, OUTPUTS)
