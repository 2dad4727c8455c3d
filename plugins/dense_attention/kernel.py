"""The kernel of attention to all keys. Letters as in the reference: L queries, T keys, H heads of K = 128 channels."""

import triton
import triton.language as tl

from wanforge.plugins.block_quantiser.kernel import store_blocks
from wanforge.plugins.quantiser.kernel import TILE, quantise_tile, rounded
from wanforge.plugins.row_moments.kernel import mean_and_variance

HEAD = tl.constexpr(128)
LOG2E = tl.constexpr(1.4426950408889634)
SOFTMAX_SCALE = tl.constexpr(0.08838834764831845 * 1.4426950408889634)
# Below every logit, but finite, so that keys without any weight may come first.
LOWEST = tl.constexpr(-3e38)
BIASES = tl.constexpr(1024)
"""Biases that are looked at together."""


@triton.jit
def attend(
    q, k, v, key_bias, y, y_scale, q_moments,
    L, T, q_stride, k_stride, v_stride, eps,
    H: tl.constexpr,
    KEYS: tl.constexpr,
    REPEATS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: softmax over k and v [T, H * K] with a running maximum, and key_bias [T] in
    float32. y is [L, H * K]; with `y_scale` it is quantised, see `finish`. With `q_moments` [2, H, L] of the rows of q, these
    are divided by their root mean square.
    """
    query = queries(q, L, q_stride)
    head = tl.program_id(1) * HEAD
    if q_moments is not None:
        row = tl.minimum(tl.program_id(0) * TILE + tl.arange(0, TILE), L - 1)
        mean, variance = mean_and_variance(q_moments, row, L, H)
        scale = (tl.rsqrt(variance + mean * mean + eps) * SOFTMAX_SCALE)[:, None]
    else:
        scale = SOFTMAX_SCALE
    maximum, total, output = nothing()
    state = attend_to(
        query, scale, k + head, v + head, key_bias, T, k_stride, v_stride, maximum, total, output, KEYS, REPEATS
    )
    finish(state, y, y_scale, L, H, q.dtype.element_ty)


@triton.jit
def attend_chunk(
    q, k, v, key_bias, own_k, own_v, y, y_scale,
    L, T, OWN, q_stride, k_stride, v_stride, own_stride,
    H: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """The same with own_k and own_v [OWN, H * K], which are attended to after the others, and key_bias [T + OWN]. Keys
    after the last one of the T whose bias is finite are not read.
    """
    query = queries(q, L, q_stride)
    head = tl.program_id(1) * HEAD
    maximum, total, output = nothing()
    end = seen_keys(key_bias, T)
    maximum, total, output = attend_to(
        query, SOFTMAX_SCALE, k + head, v + head, key_bias, end, k_stride, v_stride, maximum, total, output, KEYS, False
    )
    own_k += head
    own_v += head
    key_bias += T
    state = attend_to(
        query, SOFTMAX_SCALE, own_k, own_v, key_bias, OWN, own_stride, own_stride, maximum, total, output, KEYS, False
    )
    finish(state, y, y_scale, L, H, q.dtype.element_ty)


@triton.jit
def queries(q, L, q_stride):
    """A tile of queries of a head. A ragged one reads its last row again instead of using a mask: such rows do not change the
    largest magnitude."""
    tile, head = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, HEAD)[None, :]
    rows = tl.minimum(tl.arange(0, TILE)[:, None], L - 1 - tile * TILE)
    return tl.load(q + tile.to(tl.int64) * TILE * q_stride + head * HEAD + (rows * q_stride + lanes))


@triton.jit
def nothing():
    """The maximum, the sum and the output of a softmax over no keys yet."""
    maximum = tl.full((TILE, 1), LOWEST, tl.float32)
    total = tl.zeros((TILE, 1), tl.float32)
    output = tl.zeros((TILE, HEAD), tl.float32)
    return maximum, total, output


@triton.jit
def finish(state, y, y_scale, L, H: tl.constexpr, dtype: tl.constexpr):
    """Write a tile of outputs. With `y_scale`, they are quantised: in int8 by tiles, with y_scale [L/128, H], or to NVFP4, as
    pairs in y [L, H * K/2] with y_scale [L, H * K/16]."""
    _, total, output = state
    tile, head = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, HEAD)[None, :]
    rows = tl.arange(0, TILE)[:, None]
    inside = rows < L - tile * TILE
    output = rounded(output * (1.0 / total), dtype)
    if y.dtype.element_ty == tl.uint8:
        store_blocks(output, y, y_scale, tile * TILE, head * HEAD, L, H * HEAD, dtype)
    else:
        y += tile.to(tl.int64) * TILE * (H * HEAD) + head * HEAD + (rows * (H * HEAD) + lanes)
        if y_scale is not None:
            steps, scale = quantise_tile(output)
            tl.store(y, steps, mask=inside)
            tl.store(y_scale + tile.to(tl.int64) * H + head, scale)
        else:
            tl.store(y, output.to(dtype), mask=inside)


@triton.jit
def seen_keys(key_bias, T):
    """The number of keys up to the last one whose bias is finite."""
    lane = tl.arange(0, BIASES)
    last = tl.zeros((BIASES,), tl.int32)
    for first in range(0, T, BIASES):
        bias = tl.load(key_bias + first + lane, mask=lane < T - first, other=-float("inf"))
        last = tl.maximum(last, tl.where(bias > -float("inf"), first + lane + 1, 0))
    return tl.max(last, 0)


@triton.jit
def rows_of(x, row, rows, x_stride, REPEATS: tl.constexpr):
    """Some rows of a head, and in place of those beyond the last one zeros; with REPEATS the last one again, which takes
    fewer registers."""
    lanes = tl.arange(0, HEAD)[None, :]
    if REPEATS:
        return tl.load(x + (tl.minimum(row, rows - 1)[:, None] * x_stride + lanes))
    else:
        return tl.load(x + (row[:, None] * x_stride + lanes), mask=(row < rows)[:, None], other=0.0)


@triton.jit
def attend_to(
    query, scale, k, v, key_bias, T, k_stride, v_stride,
    maximum, total, output,
    KEYS: tl.constexpr,
    REPEATS: tl.constexpr,
):  # fmt: skip
    """Add T keys of one head to a softmax."""
    key = tl.arange(0, KEYS)
    for first in range(0, T, KEYS):
        place = tl.cast(first, tl.int64)
        bias = tl.load(key_bias + first + key, mask=key < T - first, other=-float("inf")) * LOG2E
        keys = rows_of(k + place * k_stride, key, T - first, k_stride, REPEATS)
        values = rows_of(v + place * v_stride, key, T - first, v_stride, REPEATS)
        logits = tl.fma(tl.dot(query, tl.trans(keys), input_precision="ieee"), scale, bias[None, :])
        higher = tl.maximum(maximum, tl.max(logits, 1, keep_dims=True))
        shrink = tl.exp2(maximum - higher)
        p = tl.exp2(logits - higher)
        total = total * shrink + tl.sum(p, 1, keep_dims=True)
        output = tl.dot(p.to(query.dtype), values, output * shrink, input_precision="ieee")
        maximum = higher
    return maximum, total, output


@triton.jit
def weigh(k, weight, y, T, k_stride, D: tl.constexpr, ROWS: tl.constexpr):
    """y [T, D] = k [T, D] times weight [D]."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * HEAD + tl.arange(0, HEAD)[None, :]
    keys = tl.load(k + rows * k_stride + columns, mask=rows < T, other=0.0).to(tl.float32)
    factor = tl.load(weight + columns).to(tl.float32)
    tl.store(y + rows * D + columns, (keys * factor).to(y.dtype.element_ty), mask=rows < T)
