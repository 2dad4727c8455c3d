"""The kernel of attention to all keys. Letters as in the reference: L queries, T keys, H heads of K = 128 channels."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import TILE, quantise_tile, rounded

HEAD = tl.constexpr(128)
LOG2E = tl.constexpr(1.4426950408889634)
SOFTMAX_SCALE = tl.constexpr(0.08838834764831845 * 1.4426950408889634)
# Below every logit, but finite, so that keys without any weight may come first.
LOWEST = tl.constexpr(-3e38)
BIASES = tl.constexpr(1024)
"""Biases that are looked at together."""


@triton.jit
def attend(
    q, k, v, key_bias, own_k, own_v, y, y_scale,
    L, T, OWN, q_stride, k_stride, v_stride, own_stride,
    H: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: softmax over k and v [T, H * K] with a running maximum, and key_bias [T] in
    float32. y is [L, H * K]; with `y_scale` [L/128, H] it is quantised.

    With own_k and own_v [OWN, H * K], these are attended to after the others, and key_bias is [T + OWN]. Then keys
    after the last one of the T whose bias is finite are not read.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, HEAD)[None, :]
    rows = tl.arange(0, TILE)[:, None]
    dtype = q.dtype.element_ty
    start = tile.to(tl.int64) * TILE
    inside = rows < L - tile * TILE
    # A ragged tile reads its last row again instead of using a mask: such rows do not change the largest magnitude.
    query = tl.load(q + start * q_stride + head * HEAD + (tl.minimum(rows, L - 1 - tile * TILE) * q_stride + lanes))

    maximum = tl.full((TILE, 1), LOWEST, tl.float32)
    total = tl.zeros((TILE, 1), tl.float32)
    output = tl.zeros((TILE, HEAD), tl.float32)
    k += head * HEAD
    v += head * HEAD
    if own_k is None:
        state = attend_to(query, k, v, key_bias, T, k_stride, v_stride, maximum, total, output, KEYS)
    else:
        end = seen_keys(key_bias, T)
        maximum, total, output = attend_to(query, k, v, key_bias, end, k_stride, v_stride, maximum, total, output, KEYS)
        own_k += head * HEAD
        own_v += head * HEAD
        state = attend_to(query, own_k, own_v, key_bias + T, OWN, own_stride, own_stride, maximum, total, output, KEYS)
    maximum, total, output = state

    output = rounded(output * (1.0 / total), dtype)
    y += start * (H * HEAD) + head * HEAD + (rows * (H * HEAD) + lanes)
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
def attend_to(
    query, k, v, key_bias, T, k_stride, v_stride,
    maximum, total, output,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Add T keys of one head to a softmax."""
    lanes = tl.arange(0, HEAD)[None, :]
    key = tl.arange(0, KEYS)
    for first in range(0, T, KEYS):
        place = tl.cast(first, tl.int64)
        is_key = key < T - first
        bias = tl.load(key_bias + first + key, mask=is_key, other=-float("inf")) * LOG2E
        keys = tl.load(k + place * k_stride + (key[:, None] * k_stride + lanes), mask=is_key[:, None], other=0.0)
        values = tl.load(v + place * v_stride + (key[:, None] * v_stride + lanes), mask=is_key[:, None], other=0.0)
        logits = tl.fma(tl.dot(query, tl.trans(keys), input_precision="ieee"), SOFTMAX_SCALE, bias[None, :])
        higher = tl.maximum(maximum, tl.max(logits, 1, keep_dims=True))
        shrink = tl.exp2(maximum - higher)
        p = tl.exp2(logits - higher)
        total = total * shrink + tl.sum(p, 1, keep_dims=True)
        output = tl.dot(p.to(query.dtype), values, output * shrink, input_precision="ieee")
        maximum = higher
    return maximum, total, output
