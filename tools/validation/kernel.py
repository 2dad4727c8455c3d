"""Triton kernels of the kinds that others have measured: a product, one with scales per block, and attention.

They are compiled, never run.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The row and column of a program's tile; GROUP rows of tiles are worked off together."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    place = tl.program_id(0) % (GROUP * columns)
    return first + place % size, place // size


@triton.jit
def product(
    a, b, c,
    M, N, K, a_stride, b_stride, c_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] b [K, N]; TRANSPOSED means that b is stored as [N, K]."""
    row, column = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows, columns = (row * BLOCK_M + tl.arange(0, BLOCK_M)) % M, (column * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    depth = tl.arange(0, BLOCK_K)
    a += rows[:, None] * a_stride + depth[None, :]
    if TRANSPOSED:
        b += depth[:, None] + columns[None, :] * b_stride
        step = BLOCK_K
    else:
        b += depth[:, None] * b_stride + columns[None, :]
        step = BLOCK_K * b_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        left = tl.load(a, mask=depth[None, :] < K - k * BLOCK_K, other=0.0)
        right = tl.load(b, mask=depth[:, None] < K - k * BLOCK_K, other=0.0)
        total = tl.dot(left, right, total)
        a += BLOCK_K
        b += step
    down, across = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(
        c + down[:, None] * c_stride + across[None, :],
        total.to(tl.float16),
        (down[:, None] < M) & (across[None, :] < N),
    )


@triton.jit
def scaled(
    a, b, c, a_scale, b_scale,
    M, N, K, a_stride, b_stride, c_stride, a_scales, b_scales,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] b [N, K]^T in fp8, with a scale per row of a and per 128 rows of b for every 128 of K."""
    row, column = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows, columns = (row * BLOCK_M + tl.arange(0, BLOCK_M)) % M, (column * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    depth = tl.arange(0, BLOCK_K)
    a += rows[:, None] * a_stride + depth[None, :]
    b += depth[:, None] + columns[None, :] * b_stride
    a_scale += rows * a_scales
    b_scale += columns // 128 * b_scales
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        left = tl.load(a, mask=depth[None, :] < K - k * BLOCK_K, other=0.0)
        right = tl.load(b, mask=depth[:, None] < K - k * BLOCK_K, other=0.0)
        place = k * BLOCK_K // 128
        total += tl.dot(left, right) * tl.load(a_scale + place)[:, None] * tl.load(b_scale + place)[None, :]
        a += BLOCK_K
        b += BLOCK_K
    down, across = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(
        c + down[:, None] * c_stride + across[None, :],
        total.to(tl.bfloat16),
        (down[:, None] < M) & (across[None, :] < N),
    )


@triton.jit
def attend(
    q, k, v, out,
    L, head_stride, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Dense attention of one head in float16, with a running maximum."""
    start, head = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64) * head_stride
    rows, keys, lanes = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N), tl.arange(0, HEAD)
    query = tl.load(q + head + (start + rows) * HEAD + lanes[None, :])
    k += head + keys[None, :] * HEAD + lanes[:, None]
    v += head + keys[:, None] * HEAD + lanes[None, :]
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    output = tl.zeros((BLOCK_M, HEAD), tl.float32)
    for _ in range(0, L, BLOCK_N):
        logits = tl.dot(query, tl.load(k))
        higher = tl.maximum(maximum, tl.max(logits, 1) * scale)
        p = tl.math.exp2(logits * scale - higher[:, None])
        shrink = tl.math.exp2(maximum - higher)
        total = total * shrink + tl.sum(p, 1)
        output = tl.dot(p.to(tl.float16), tl.load(v), output * shrink[:, None])
        maximum = higher
        k += BLOCK_N * HEAD
        v += BLOCK_N * HEAD
    tl.store(out + head + (start + rows) * HEAD + lanes[None, :], (output / total[:, None]).to(tl.float16))


@triton.jit
def attend_int8(
    q, k, v, q_step, k_step, out,
    L, head_stride, key_steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Dense attention of one head with int8 queries and keys, a step per block of each, and float16 values and sums."""
    start, head = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64) * head_stride
    rows, keys, lanes = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N), tl.arange(0, HEAD)
    query = tl.load(q + head + (start + rows) * HEAD + lanes[None, :])
    step = tl.load(q_step + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
    k += head + keys[None, :] * HEAD + lanes[:, None]
    v += head + keys[:, None] * HEAD + lanes[None, :]
    k_step += tl.program_id(1) * key_steps
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    output = tl.zeros((BLOCK_M, HEAD), tl.float32)
    for first in range(0, L, BLOCK_N):
        inside = keys < L - first
        logits = tl.dot(query, tl.load(k, mask=inside[None, :], other=0)).to(tl.float32) * (step * tl.load(k_step))
        higher = tl.maximum(maximum, tl.max(logits, 1))
        p = tl.math.exp2(logits - higher[:, None])
        shrink = tl.math.exp2(maximum - higher)
        total = total * shrink + tl.sum(p, 1)
        value = tl.load(v, mask=inside[:, None], other=0.0)
        output = output * shrink[:, None] + tl.dot(p.to(tl.float16), value, out_dtype=tl.float16)
        maximum = higher
        k += BLOCK_N * HEAD
        v += BLOCK_N * HEAD
        k_step += 1
    tl.store(out + head + (start + rows) * HEAD + lanes[None, :], (output / total[:, None]).to(tl.float16))
