"""Kernels of sparse-linear attention. Letters as in the reference: L tokens, H heads of K = 128 channels, M query blocks,
N key blocks; in addition C chunks of tokens, whose partial sums are added in a fixed order.

`statistics` and `keys_values` each read the keys and values once, at memory speed; `linear_state`, `scores` and `select`
are small; `attention` comes last. ARITHMETIC is the `arithmetic` of `reference.Blocks`.
"""

import triton
import triton.language as tl

from wanforge.plugins.block_quantiser.kernel import store_blocks
from wanforge.plugins.quantiser.kernel import INTERPRETED, quantise_tile, rounded, to_e4m3, whole_steps

HEAD = tl.constexpr(128)
LEAST = tl.constexpr(16)
"""The fewest rows of a product that tensor cores compute."""
LOG2E = tl.constexpr(1.4426950408889634)
SOFTMAX_SCALE = tl.constexpr(0.08838834764831845 * LOG2E)


@triton.jit
def to_steps(x, step):
    """x in whole steps as int8, halves rounded away from zero: the reciprocal is made one unit larger for them."""
    return whole_steps(x * (tl.math.div_rn(1.0, step) * 1.00000012))


@triton.jit
def power(x):
    """2 to the x, where what a float32 holds with fewer digits becomes zero."""
    if INTERPRETED:
        return tl.exp2(x)
    # Triton's own function scales small numbers before and after.
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def in_groups(x, GROUPS: tl.constexpr):
    """x [R, K] as [R / GROUPS, GROUPS, K]. With as many groups as rows that all warps hold at a time, a thread reduces the
    first axis alone."""
    return tl.reshape(x, (x.shape[0] // GROUPS, GROUPS, x.shape[1]))


@triton.jit
def statistics(
    k, v, k_sum, v_amax, state, mass,
    L, k_stride, v_stride, chunk_rows,
    H: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    ADDS_LATER: tl.constexpr,
):  # fmt: skip
    """Per chunk and head, in float32: the sum of the keys and the largest magnitude of the values, [C, H, K], and for the
    linear branch phi(k)^T v [C, H, K, K] and the sum of phi(k) [C, H, K]."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, HEAD)
    lanes = lane[None, :]
    dtype = k.dtype.element_ty
    # Here and below, addresses are one 64-bit number plus small offsets: tiles of 64-bit numbers would fill the registers.
    first = chunk.to(tl.int64) * chunk_rows
    row = tl.arange(0, ROWS)[:, None]
    k += first * k_stride + head * HEAD + (row * k_stride + lanes)
    v += first * v_stride + head * HEAD + (row * v_stride + lanes)
    total = tl.zeros((HEAD, HEAD), tl.float32)
    weight = tl.zeros((GROUPS, HEAD), tl.float32)
    key_sum = tl.zeros((GROUPS, HEAD), tl.float32)
    largest = tl.zeros((GROUPS, HEAD), tl.float32)
    for start in range(0, tl.minimum(chunk_rows, L - chunk * chunk_rows), ROWS):
        inside = row < L - chunk * chunk_rows - start
        key = tl.load(k, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(v, mask=inside, other=0.0)
        key_sum += tl.sum(in_groups(key, GROUPS), 0)
        e = power(tl.fma(key, LOG2E, tl.max(key, 1, keep_dims=True) * -LOG2E))
        feature = rounded(e * tl.where(inside, 1.0 / tl.sum(e, 1, keep_dims=True), 0.0), dtype)
        weight += tl.sum(in_groups(feature, GROUPS), 0)
        columns = tl.trans(feature.to(dtype))
        if ADDS_LATER:
            # The limit on inexact sums means nothing to these types, but keeps Triton from joining the sum to the product.
            # Joined in wgmma, the product would go on while the next value is copied over this one.
            total += tl.dot(columns, value, input_precision="ieee", max_num_imprecise_acc=ROWS)
        else:
            total = tl.dot(columns, value, total, input_precision="ieee")
        if v_amax is not None:
            largest = tl.maximum(largest, tl.max(in_groups(tl.abs(value), GROUPS), 0))
        k += ROWS * k_stride
        v += ROWS * v_stride
    place = chunk.to(tl.int64) * H + head
    tl.store(k_sum + place * HEAD + lane, tl.sum(key_sum, 0))
    tl.store(mass + place * HEAD + lane, tl.sum(weight, 0))
    tl.store(state + place * (HEAD * HEAD) + (lane[:, None] * HEAD + lanes), total)
    if v_amax is not None:
        tl.store(v_amax + place * HEAD + lane, tl.max(largest, 0))


@triton.jit
def keys_values(
    k, v, k_sum, v_amax,
    k_steps, k_step, k_pooled, v_steps, v_scale,
    L, k_stride, v_stride, N, padded,
    H: tl.constexpr,
    C: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """From the keys and values of a head, compute the means of key blocks [H, N, K] and, in 8-bit arithmetic, the keys as
    int8 [H, padded, K] with a step per block [H, N] and the values as fp8 [H, K, padded] or fp16 [H, padded, K]. A program
    handles BLOCKS of N.
    """
    first, head = tl.program_id(0) * BLOCKS, tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, HEAD)
    lanes = lane[None, :]
    dtype = k.dtype.element_ty

    chunks = tl.arange(0, C)[:, None] * (H * HEAD) + tl.program_id(1) * HEAD + lanes
    mean = rounded(tl.sum(tl.load(k_sum + chunks), 0) / L, dtype)
    if ARITHMETIC == "sage_fp8":
        amax = tl.max(tl.load(v_amax + chunks), 0)
        factor = tl.where(amax > 0, tl.math.div_rn(2.25, tl.where(amax > 0, amax, 1.0)), 1.0)
        if first == 0:
            tl.store(v_scale + head * HEAD + lane, tl.math.div_rn(amax, 2.25))

    row = tl.arange(0, BLOCK_K)
    rows = row[:, None]
    k += head * HEAD + (rows * k_stride + lanes)
    v += head * HEAD + (rows * v_stride + lanes)
    k_pooled += head * N * HEAD + lane
    if ARITHMETIC != "sla":
        k_steps += head * padded * HEAD + (rows * HEAD + lanes)
        k_step += head * N
    if ARITHMETIC == "sage_fp8":
        v_steps += head * HEAD * padded + (lane[:, None] * padded + row[None, :])
    if ARITHMETIC == "sage_fp16":
        v_steps += head * padded * HEAD + (rows * HEAD + lanes)

    for block in tl.range(first, tl.minimum(first + BLOCKS, N), num_stages=STAGES):
        start = tl.cast(block, tl.int64) * BLOCK_K
        held = tl.minimum(L - block * BLOCK_K, BLOCK_K)
        inside = rows < held
        key = tl.load(k + start * k_stride, mask=inside, other=0.0).to(tl.float32)
        if ARITHMETIC != "sla":
            value = tl.load(v + start * v_stride, mask=inside, other=0.0)
        smooth = tl.where(inside, rounded(key - mean[None, :], dtype), 0.0)
        tl.store(k_pooled + block * HEAD, (tl.sum(smooth, 0) / (held * 1.0)).to(dtype))
        if ARITHMETIC != "sla":
            step = tl.math.div_rn(tl.max(tl.max(tl.abs(smooth), 0), 0), 127.0) + 1e-7
            tl.store(k_steps + start * HEAD, to_steps(smooth, step))
            tl.store(k_step + block, step)
            if ARITHMETIC == "sage_fp8":
                tl.store(v_steps + start, tl.trans(to_e4m3(value.to(tl.float32) * factor[None, :])))
            else:
                tl.store(v_steps + start * HEAD, value.to(tl.float16))


@triton.jit
def linear_state(
    state, mass, projection, folded, folded_mass,
    H: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The linear branch of one head over all chunks: phi(k)^T v times projection^T [K, K], and the sum of phi(k) [K]."""
    head = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, HEAD)
    dtype = folded.dtype.element_ty
    state += head * HEAD * HEAD + (rows[:, None] * HEAD + lane[None, :])
    total = tl.zeros((ROWS, HEAD), tl.float32)
    for chunk in tl.range(C, num_stages=STAGES):
        total += tl.load(state + chunk * (H * HEAD * HEAD))
    chunks = tl.arange(0, C)[:, None] * (H * HEAD)
    weight = tl.sum(tl.load(mass + head * HEAD + (chunks + rows[None, :])), 0)
    transposed = tl.load(projection + lane[None, :] * HEAD + lane[:, None]).to(dtype)
    product = tl.dot(total.to(dtype), transposed, input_precision="ieee")
    tl.store(folded + (head * HEAD + rows[:, None]) * HEAD + lane[None, :], product.to(dtype))
    tl.store(folded_mass + head * HEAD + rows, rounded(weight, dtype))


@triton.jit
def scores(
    q, k_pooled, score,
    L, q_stride, M, N, P,
    H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Products of the means of query and key blocks in the compute type, the first N of each row of [H, M, P]. A program
    handles QUERIES of M."""
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, HEAD)[None, :]
    query = tl.arange(0, LEAST)[:, None]
    dtype = q.dtype.element_ty
    q += tl.cast(first * BLOCK_Q, tl.int64) * q_stride + head * HEAD
    rows = tl.arange(0, BLOCK_Q)[:, None]
    column = tl.arange(0, BLOCK_Q)[None, :]
    # Tensor cores add the rows of a block, by a factor of ones in the row that is to hold their sum.
    pooled = tl.zeros((LEAST, HEAD), tl.float32)
    for i in range(QUERIES):
        start = (first + i) * BLOCK_Q
        tile = q + tl.cast(i * BLOCK_Q, tl.int64) * q_stride
        values = tl.load(tile + (rows * q_stride + lanes), mask=rows < L - start, other=0.0)
        ones = ((query == i) & (column >= 0)).to(dtype)
        pooled = tl.dot(ones, values, pooled, input_precision="ieee")
    held = tl.maximum(tl.minimum(L - (first + query) * BLOCK_Q, BLOCK_Q), 1) * 1.0
    pooled = (pooled / held).to(dtype)
    inside = (query < QUERIES) & (first + query < M)
    for key in range(0, N, KEYS):
        keys = key + tl.arange(0, KEYS)[:, None]
        means = tl.load(k_pooled + (head * N + keys) * HEAD + lanes, mask=keys < N, other=0.0)
        product = tl.dot(pooled, tl.trans(means), input_precision="ieee")
        columns = key + tl.arange(0, KEYS)[None, :]
        place = (head * M + first + query) * P + columns
        tl.store(score + place, product.to(dtype), mask=inside & (columns < P))


@triton.jit
def select(score, selected, M, N, P, num_selected, H: tl.constexpr, LANES: tl.constexpr):
    """Select the indices of the num_selected best of the N scores that begin each row of [H, M, P], ascending; among
    equal scores the lower index wins. A program handles one query block.

    The lowest selected score is found bit by bit, on integers that sort like the floats.
    """
    dtype = score.dtype.element_ty
    BITS: tl.constexpr = dtype.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < N
    value = tl.load(score + row * P + lane, mask=lane < P, other=0.0).to(tl.float32)
    value = (value + 0.0).to(dtype)  # -0 becomes 0
    bits = value.to(tl.int16 if BITS == 16 else tl.int32, bitcast=True).to(tl.int32)
    order = (bits ^ ((bits >> 31) | -(2 ** (BITS - 1)))).to(tl.uint32, bitcast=True) & (2**BITS - 1)
    order = tl.where(inside, order, 0)
    threshold = tl.full((), 0, tl.uint32)
    for bit in tl.static_range(BITS):
        candidate = threshold | (2 ** (BITS - 1 - bit))
        enough = tl.sum((order >= candidate).to(tl.int32)) >= num_selected
        threshold = tl.where(enough, candidate, threshold)
    better = order > threshold
    equal = inside & (order == threshold)
    left = num_selected - tl.sum(better.to(tl.int32))
    chosen = better | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(selected + row * num_selected + place, lane, mask=chosen)


@triton.jit
def multiply(query, k, k_step, chosen, key, L, k_stride, scale, ARITHMETIC: tl.constexpr):
    """The products of a query block with the key block `chosen`, and the factor that makes logits of them."""
    BLOCK_K: tl.constexpr = key.shape[0]
    lane = tl.arange(0, HEAD)[:, None]
    first = chosen.to(tl.int64) * BLOCK_K
    if ARITHMETIC == "sla":
        is_key = (key < L - chosen * BLOCK_K)[None, :]
        keys = tl.load(k + first * k_stride + (key[None, :] * k_stride + lane), mask=is_key, other=0.0)
        return tl.dot(query, keys, input_precision="ieee"), scale
    else:
        keys = tl.load(k + first * HEAD + (key[None, :] * HEAD + lane))
        return tl.dot(query, keys, out_dtype=tl.int32).to(tl.float32), scale * tl.load(k_step + chosen)


@triton.jit
def weigh(logits, maximum, total, offset):
    """One step of softmax: the probabilities of a key block, by how much everything before it shrinks, and the new maximum
    and total."""
    higher = tl.maximum(maximum, tl.max(logits, 1, keep_dims=True))
    shrink = power(maximum - higher)
    p = power(logits - (higher - offset))
    return p, shrink, higher, total * shrink + tl.sum(p, 1, keep_dims=True)


@triton.jit
def values_of(v, chosen, key, L, v_stride, padded, ARITHMETIC: tl.constexpr):
    """The values of the key block `chosen`."""
    BLOCK_K: tl.constexpr = key.shape[0]
    lane = tl.arange(0, HEAD)
    first = chosen.to(tl.int64) * BLOCK_K
    if ARITHMETIC == "sage_fp8":
        return tl.trans(tl.load(v + first + (lane[:, None] * padded + key[None, :])))
    elif ARITHMETIC == "sage_fp16":
        return tl.load(v + first * HEAD + (key[:, None] * HEAD + lane[None, :]))
    else:
        is_key = (key < L - chosen * BLOCK_K)[:, None]
        return tl.load(v + first * v_stride + (key[:, None] * v_stride + lane[None, :]), mask=is_key, other=0.0)


@triton.jit
def add_values(output, shrink, p, values, SUMS: tl.constexpr, IS_APART: tl.constexpr):
    """`output` times `shrink`, plus the sum of `values` with the weights `p`."""
    if SUMS == "fp16":
        return tl.fma(output, shrink, tl.dot(p, values, out_dtype=tl.float16).to(tl.float32))
    elif IS_APART:
        # The limit on inexact sums keeps Triton from joining the sum to the product.
        LIMIT: tl.constexpr = p.shape[1]
        return output * shrink + tl.dot(p, values, input_precision="ieee", max_num_imprecise_acc=LIMIT)
    else:
        return tl.dot(p, values, output * shrink, input_precision="ieee")


@triton.jit
def attention(
    q, k, k_step, v, v_scale, selected, folded, folded_mass, bias, y, y_scale,
    L, q_stride, k_stride, v_stride, padded, M, N, num_selected,
    H: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUMS: tl.constexpr,
    ADDS_LATER: tl.constexpr,
    FP8_IN_FULL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One query block of one head: softmax over its selected key blocks, in ascending order with a running maximum, plus
    the linear branch. y is [L, H * K]. With `y_scale` it is quantised: in int8 by tiles, with y_scale [M, H] and a BLOCK_Q of
    128, or to NVFP4, as pairs in y [L, H * K/2] with y_scale [L, H * K/16].

    `k` and `v` are [L, H * K] in the compute type, or the output of `keys_values`. SUMS is `reference.Blocks.pv_sum`.
    With ADDS_LATER, what key blocks contribute is added up outside of the tensor cores; with fp8, without FP8_IN_FULL,
    because tensor cores then add with fewer bits than float32 has. STAGES are those of the loop if y is quantised.
    """
    LOOP_STAGES: tl.constexpr = STAGES if y_scale is not None else None
    IS_APART: tl.constexpr = not FP8_IN_FULL if ARITHMETIC == "sage_fp8" else ADDS_LATER
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, HEAD)
    lanes = lane[None, :]
    rows = tl.arange(0, BLOCK_Q)[:, None]
    start = block.to(tl.int64) * BLOCK_Q
    inside = rows < L - block * BLOCK_Q
    q += start * q_stride + head * HEAD
    dtype = q.dtype.element_ty
    query = tl.load(q + rows * q_stride + lanes, mask=inside, other=0.0)
    scale = SOFTMAX_SCALE
    offset = 0.0
    if ARITHMETIC != "sla":
        query = query.to(tl.float32)
        q_step = tl.math.div_rn(tl.max(tl.abs(query)), 127.0) + 1e-7
        query = to_steps(query, q_step)
        scale = SOFTMAX_SCALE * q_step
    if ARITHMETIC == "sage_fp8":
        offset = 8.807

    key = tl.arange(0, BLOCK_K)
    if ARITHMETIC == "sla":
        k += head * HEAD
        v += head * HEAD
    else:
        k += head * padded * HEAD
        v += head * padded * HEAD
        k_step += head * N
    maximum = tl.full((BLOCK_Q, 1), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q, 1), tl.float32)
    output = tl.zeros((BLOCK_Q, HEAD), tl.float32)
    selected += (head * M + block) * num_selected
    if not ADDS_LATER:
        chosen = tl.load(selected)
    for i in tl.range(num_selected, num_stages=LOOP_STAGES):
        if ADDS_LATER:
            chosen = tl.load(selected + i)
        products, factor = multiply(query, k, k_step, chosen, key, L, k_stride, scale, ARITHMETIC)
        mask = tl.where(key < L - chosen * BLOCK_K, 0.0, -float("inf"))[None, :]
        p, shrink, maximum, total = weigh(tl.fma(products, factor, mask), maximum, total, offset)
        values = values_of(v, chosen, key, L, v_stride, padded, ARITHMETIC)
        p = to_e4m3(p) if ARITHMETIC == "sage_fp8" else p.to(values.dtype)
        output = add_values(output, shrink, p, values, SUMS, IS_APART)
        if not ADDS_LATER:
            # Asked for a round ahead, so that the mask need not wait for it. Where wgmma or tcgen05 multiplies, this would
            # take registers that are not there.
            chosen = tl.load(selected + tl.minimum(i + 1, num_selected - 1))

    # The linear branch is added to the sparse one and rounded once, where the reference rounds three times.
    output *= 1.0 / total
    if ARITHMETIC == "sage_fp8":
        output *= tl.load(v_scale + head * HEAD + lanes)
    query = tl.load(q + (rows * q_stride + lanes), mask=inside, other=0.0).to(tl.float32)
    feature = power(tl.fma(query, LOG2E, tl.max(query, 1, keep_dims=True) * -LOG2E))
    mass = tl.sum(feature * tl.load(folded_mass + head * HEAD + lanes), 1, keep_dims=True)
    feature *= 1.0 / (mass + 1e-5 * tl.sum(feature, 1, keep_dims=True))
    matrix = tl.load(folded + head * (HEAD * HEAD) + (lane[:, None] * HEAD + lanes))
    output = tl.dot(feature.to(dtype), matrix, output, input_precision="ieee")
    output = rounded(output + tl.load(bias + lanes).to(tl.float32), dtype)
    if y.dtype.element_ty == tl.uint8:
        store_blocks(tl.where(inside, output, 0.0), y, y_scale, block * BLOCK_Q, head * HEAD, L, H * HEAD, dtype)
    else:
        y += start * (H * HEAD) + head * HEAD
        place = rows * (H * HEAD) + lanes
        if y_scale is not None:
            steps, scale = quantise_tile(tl.where(inside, output, 0.0))
            tl.store(y + place, steps, mask=inside)
            tl.store(y_scale + block.to(tl.int64) * H + head, scale)
        else:
            tl.store(y + place, output.to(dtype), mask=inside)
