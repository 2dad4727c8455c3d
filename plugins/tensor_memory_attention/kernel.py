"""The sparse attention of `sparse_linear_attention.kernel` in Gluon, for `tcgen05` of sm_100, with int8 queries and keys
and fp8 probabilities and values. Letters as there.

A program has 128 queries on four warps, and a thread has one of them: the products of its query with two blocks of keys,
which share a maximum, are in its registers. Two programs fit on an SM, and each has half of the tensor memory: 128 columns
for the products of a pair of blocks, and 128 for the outputs. As soon as all threads have loaded the products of a pair,
tensor cores multiply the next one, and they add the values of a pair while threads take the next exponentials.

Threads meet twice for each pair, once they have loaded its products and once they have stored its probabilities:

- Products of queries and keys of pair i are complete: nobody reads its keys any more, whose slot takes pair i + 2. The
  products of pair i + 1 may begin where those of pair i were.
- The values of pair i - 1 are added: probabilities may be replaced, outputs shrunk, and its slot of values takes pair i + 1.

Outputs stay in tensor memory, and are shrunk there for each pair. The products after the last pair are of no use: leaving
them out would let the assembler ask in a loop which thread begins a product. Copies, waits, and what is done between
exponentials are written in PTX for the reason that `warpgroup_attention.kernel` gives; Triton would put a barrier between
a load of tensor memory and a store to the same place.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fma2,
    tcgen05_mma,
)
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from wanforge.plugins.tensor_memory_linear.kernel import commit, meet
from wanforge.plugins.warp_attention.kernel import features_of, zero_after
from wanforge.plugins.warpgroup_attention.kernel import (
    BYTES_SHARED,
    HALF_SHARED,
    OFFSET,
    PLAIN_SHARED,
    SOFTMAX_SCALE,
    address,
    chosen_of,
    divided,
    power,
    steps_of,
    wait,
    whole_steps,
)

HEAD = gl.constexpr(128)
QUERIES = gl.constexpr(128)
KEYS = gl.constexpr(64)
THREADS = gl.constexpr(128)
SLOT = gl.constexpr(16384)
"""Bytes of the keys of a pair of blocks, and of its values."""
PIECE = gl.constexpr(32)
"""Queries whose features are found at a time."""

EACH = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
LOADED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
BYTES_STORED = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0]))
HALF_STORED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
SUMS = gl.constexpr(TensorMemoryLayout([128, 128], 1))
WORDS = gl.constexpr(gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0]))
"""The probabilities of a query for a block, four in a word."""
SHRUNK = gl.constexpr(32)
"""Outputs of a query that are shrunk at a time."""


@gluon.constexpr_function
def key_copies():
    """PTX of a thread's copies of a pair of blocks of keys: pieces of 16 bytes of four keys of each."""
    lines = ["{", ".reg .pred wanted;", ".reg .b32 row, last, place;", ".reg .b64 origin, far;"]
    lines += ["setp.ne.b32 wanted, $5, 0;", "mov.u32 row, %tid.x;", "shr.u32 row, row, 3;"]
    for half in range(2):
        lines += [
            f"mad.wide.s32 origin, ${2 + half}, 8192, $1;",
            f"mad.lo.s32 last, ${2 + half}, -64, $4;",
        ]
        for i in range(4):
            lines += [
                f"add.s32 place, row, {16 * i};",
                "min.s32 place, place, last;",
                "mad.wide.s32 far, place, 128, origin;",
                f"@wanted cp.async.cg.shared.global [$0 + {8192 * half + 2048 * i}], [far], 16;",
            ]
    return "\n".join([*lines, "cp.async.commit_group;", "}"])


@gluon.constexpr_function
def value_copies():
    """PTX of a thread's copies of the values of a pair of blocks: pieces of 16 bytes of four channels of each."""
    lines = ["{", ".reg .pred wanted;", ".reg .b64 far, step;", "setp.ne.b32 wanted, $6, 0;"]
    lines += ["mul.wide.s32 step, $5, 32;"]
    for half in range(2):
        lines += [f"mad.wide.s32 far, ${3 + half}, 64, $2;"]
        for i in range(4):
            lines += [f"@wanted cp.async.cg.shared.global [${half} + {4096 * i}], [far], 16;"]
            lines += ["add.s64 far, far, step;"] if i < 3 else []
    return "\n".join([*lines, "cp.async.commit_group;", "}"])


@gluon.jit
def copy_keys(place, k, chosen, L, is_wanted):
    """Begin a thread's copies of the keys of a pair of blocks as a group, which is empty if they are not wanted. Past the last
    key, where values are zero, that key is repeated."""
    given = [place, k, chosen[0], chosen[1], L - 1, is_wanted.to(gl.int32)]
    gl.inline_asm(key_copies(), "r,l,r,r,r,r", given)


@gluon.jit
def copy_values(place, v, chosen, padded, is_wanted):
    """Begin a thread's copies of the values of a pair of blocks as a group, which is empty if they are not wanted."""
    given = [place[0], place[1], v, chosen[0], chosen[1], padded, is_wanted.to(gl.int32)]
    gl.inline_asm(value_copies(), "r,r,l,r,r,r,r", given)


@gluon.jit
def multiply(a, b, sums, counts, barrier):
    """Begin the product of a [M, K] and b [K, N], added to what is there if that counts, and arrive at an mbarrier once it is
    complete."""
    tcgen05_mma(a, b, sums, use_acc=counts, mbarriers=[])
    commit(barrier, gl.to_tensor(True))


@gluon.constexpr_function
def packing(outputs, inputs):
    """PTX of the sum of a block's probabilities, the last one, and all of them in fp8."""
    (total,), (last,), words = outputs
    (p,) = inputs
    lines = ["{", ".reg .b16 low, high;", ".reg .b64 pair, sums0, sums1, sums2, sums3;", ".reg .b32 even, odd;"]
    for i in range(len(p) // 2):
        lines += [f"mov.b64 pair, {{{p[2 * i]}, {p[2 * i + 1]}}};"]
        lines += [f"mov.b64 sums{i}, pair;" if i < 4 else f"add.rn.f32x2 sums{i % 4}, sums{i % 4}, pair;"]
    lines += ["add.rn.f32x2 sums0, sums0, sums1;", "add.rn.f32x2 sums2, sums2, sums3;"]
    lines += ["add.rn.f32x2 sums0, sums0, sums2;", "mov.b64 {even, odd}, sums0;", f"add.rn.f32 {total}, even, odd;"]
    for i in range(len(words)):
        lines += [
            f"cvt.rn.satfinite.e4m3x2.f32 low, {p[4 * i + 1]}, {p[4 * i]};",
            f"cvt.rn.satfinite.e4m3x2.f32 high, {p[4 * i + 3]}, {p[4 * i + 2]};",
            f"mov.b32 {words[i]}, {{low, high}};",
        ]
    return "\n".join([*lines, f"mov.b32 {last}, {p[-1]};", "}"])


@gluon.jit
def packed(p, row: gl.constexpr):
    """The sum of each query's probabilities for a block, the last one, and all of them in fp8."""
    words: gl.constexpr = gl.distributed_type(gl.int32, [QUERIES, KEYS // 4], WORDS)
    return gl.inline_asm(packing, ("=&f", "=&f", "=&r", "f"), [p], (row, row, words), is_pure=True)


@gluon.constexpr_function
def stores(outputs, inputs):
    """PTX that stores a thread's probabilities for a pair of blocks, of which eighths are swizzled."""
    (place,), *blocks = inputs
    lines = ["{", ".reg .b32 row, there;", "mov.u32 row, %tid.x;", "and.b32 row, row, 7;"]
    for i in range(8):
        words = blocks[i // 4][i % 4 * 4 : i % 4 * 4 + 4]
        lines += [f"xor.b32 there, row, {i};", f"mad.lo.s32 there, there, 16, {place};"]
        lines += [f"st.shared.v4.b32 [there], {{{', '.join(words)}}};"]
    return "\n".join([*lines, "}"])


@gluon.jit
def clear(sums):
    """Store zeros."""
    layout: gl.constexpr = sums.get_reg_layout()
    sums.store(gl.zeros(sums.shape, gl.float32, layout))


@gluon.constexpr_function
def shrinking(outputs, inputs):
    """PTX that multiplies some of a thread's outputs, which begin at an address, by a factor."""
    (first,), (factor,) = inputs
    names = [f"x{i}" for i in range(SHRUNK.value)]
    every = ", ".join(names)
    shape = f"sync.aligned.32x32b.x{len(names)}.b32"
    lines = ["{", f".reg .b32 {every};", ".reg .b64 both, pair;", f"mov.b64 both, {{{factor}, {factor}}};"]
    lines += [f"tcgen05.ld.{shape} {{{every}}}, [{first}];", "tcgen05.wait::ld.sync.aligned;"]
    for one, other in zip(names[::2], names[1::2], strict=True):
        lines += [f"mov.b64 pair, {{{one}, {other}}};", "mul.rn.f32x2 pair, pair, both;"]
        lines += [f"mov.b64 {{{one}, {other}}}, pair;"]
    return "\n".join([*lines, f"tcgen05.st.{shape} [{first}], {{{every}}};", "}"])


@gluon.jit
def shrink_outputs(outputs, factor, half: gl.constexpr):
    """Multiply half of a thread's outputs by a factor."""
    for piece in gl.static_range(HEAD // SHRUNK // 2):
        first = outputs + half * (HEAD // 2) + piece * SHRUNK
        gl.inline_asm(shrinking, ("r", "f"), [first, factor])


@gluon.jit
def exponentials(logits, step, offset):
    """The probabilities of a block."""
    return power(fma2(logits.to(gl.float32), step, offset[:, None]))


@gluon.jit
def attention(
    q, k, k_step, v, v_scale, selected, folded, folded_mass, bias, y, y_scale,
    L, q_stride, padded, M, N, num_selected,
    H: gl.constexpr,
):  # fmt: skip
    """`sparse_linear_attention.kernel.attention` of 128 queries by 64 keys with `sage_fp8`."""
    block, head = gl.program_id(0), gl.program_id(1).to(gl.int64)
    dtype: gl.constexpr = q.dtype.element_ty
    k_step += head * N
    selected += (head * M + block) * num_selected
    last, pairs = num_selected - 1, (num_selected + 1) // 2
    # What is needed soon is asked for at once, because each answer takes as long as hundreds of instructions.
    chosen, following = chosen_of(selected, 0, last), chosen_of(selected, 1, last)
    ahead, final = chosen_of(selected, 2, last), gl.load(selected + last)
    start, left = block.to(gl.int64) * QUERIES, L - block * QUERIES
    rows = gl.arange(0, QUERIES, gl.SliceLayout(1, LOADED))[:, None]
    lane = gl.arange(0, HEAD, gl.SliceLayout(0, LOADED))
    q += start * q_stride + head * HEAD
    query = gl.load(q + (rows * q_stride + lane[None, :]), mask=rows < left, other=0.0)
    thread = gl.arange(0, THREADS, EACH)
    channel_scale = gl.load(v_scale + head * HEAD + thread)
    channel_bias = gl.load(bias + thread).to(gl.float32)

    keys = gl.allocate_shared_memory(gl.int8, [2, 2 * KEYS, HEAD], BYTES_SHARED)
    values = gl.allocate_shared_memory(gl.float8e4nv, [2, HEAD, 2 * KEYS], BYTES_SHARED)
    weights = gl.allocate_shared_memory(gl.float8e4nv, [QUERIES, 2 * KEYS], BYTES_SHARED)
    barriers = mbarrier.allocate_mbarrier(batch=2)
    for each in gl.static_range(2):
        mbarrier.init(barriers.index(each), count=1)
    logits = allocate_tensor_memory(gl.int32, [QUERIES, 2 * KEYS], SUMS)
    sums = allocate_tensor_memory(gl.float32, [QUERIES, HEAD], SUMS)
    clear(sums)
    row, channel = thread // 8, thread // 4
    k += head * padded * HEAD + thread % 8 * 16
    v += head * padded * HEAD + (channel * padded + thread % 4 * 16)
    key_place = address(keys) + row * HEAD + (thread % 8 ^ row % 8) * 16
    value_place = address(values) + channel * (2 * KEYS) + (thread % 4 ^ channel % 8) * 16
    weight_place, outputs = address(weights) + thread * (2 * KEYS), address(sums) + (thread // 32 << 21)
    found, added = address(barriers), address(barriers) + 8
    always = gl.to_tensor(True)
    steps = steps_of(k_step, chosen)
    # Only the last block may have keys past the end, and an odd number of blocks lacks the last one of a pair.
    repeats = gl.maximum(final * KEYS + KEYS - L, 0).to(gl.float32)
    copy_keys(key_place, k, chosen, L, always)
    copy_keys(key_place + SLOT, k, following, L, always)
    copy_values((value_place, value_place ^ 64), v, chosen, padded, always)

    scales = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, channel_scale)
    biases = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, channel_bias)
    query = query.to(gl.float32)
    q_step = divided(gl.max(gl.abs(query).reshape((QUERIES * HEAD,)), 0), 127.0) + 1e-7
    query = whole_steps(query * (divided(1.0, q_step) * 1.00000012))
    queries = gl.allocate_shared_memory(gl.int8, [QUERIES, HEAD], BYTES_SHARED, query)
    scale = SOFTMAX_SCALE * q_step
    meet(2)
    multiply(queries, keys.index(0).permute((1, 0)), logits, False, found)
    commit(added, always)

    layout: gl.constexpr = logits.slice(0, KEYS).get_reg_layout()
    per_row: gl.constexpr = gl.SliceLayout(1, layout)
    maximum = gl.full([QUERIES], -float("inf"), gl.float32, per_row)
    total = gl.zeros([QUERIES], gl.float32, per_row)
    for i in range(pairs):
        wait(found, i & 1)
        gl.inline_asm("tcgen05.fence::after_thread_sync;")
        later, next_steps = chosen_of(selected, i + 3, last), steps_of(k_step, following)
        first, second = logits.slice(0, KEYS).load(layout), logits.slice(KEYS, KEYS).load(layout)
        copy_keys(key_place + i % 2 * SLOT, k, ahead, L, i + 2 < pairs)
        meet(2)
        multiply(queries, keys.index((i + 1) % 2).permute((1, 0)), logits, False, found)
        step = scale * steps[0], scale * steps[1]
        lacking = gl.where(2 * i < last, 0.0, -float("inf"))
        higher = gl.maximum(maximum, gl.max(first, 1).to(gl.float32) * step[0])
        higher = gl.maximum(higher, gl.fma(gl.max(second, 1).to(gl.float32), step[1], lacking))
        shrink, offset = power(maximum - higher), OFFSET - higher
        maximum = higher
        wait(added, i & 1)
        gl.inline_asm("tcgen05.fence::after_thread_sync;")
        shrink_outputs(outputs, shrink, 0)
        first_sum, first_last, first = packed(exponentials(first, step[0], offset), maximum.type)
        shrink_outputs(outputs, shrink, 1)
        second_sum, second_last, second = packed(exponentials(second, step[1], offset + lacking), maximum.type)
        first_sum = gl.fma(first_last, gl.where(2 * i < last, 0.0, -repeats), first_sum)
        second_sum = gl.fma(second_last, gl.where(2 * i + 1 < last, 0.0, -repeats), second_sum)
        total = gl.fma(total, shrink, first_sum + second_sum)
        place = value_place + (i + 1) % 2 * SLOT
        copy_values((place, place ^ 64), v, following, padded, i + 1 < pairs)
        gl.inline_asm(stores, ("r", "r", "r"), [weight_place, first, second])
        gl.inline_asm("tcgen05.wait::st.sync.aligned;")
        meet(2)
        multiply(weights, values.index(i % 2).permute((1, 0)), sums, True, added)
        following, ahead, steps = ahead, later, next_steps

    # The linear branch is added to the sparse one and rounded once, where the reference rounds three times. What it needs
    # is worked out after the loop, for which there are no registers before.
    zero = zero_after(total)
    L += zero
    q_stride += 16 * zero
    lane = gl.arange(0, HEAD, gl.SliceLayout(0, LOADED)) + 16 * zero
    left = L - block * QUERIES
    key_mass = gl.load(folded_mass + head * HEAD + lane)[None, :]
    pieces = ()
    for piece in gl.static_range(QUERIES // PIECE):
        rows = piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, LOADED))[:, None]
        query = gl.load(q + (rows * q_stride + lane[None, :]), mask=rows < left, other=0.0)
        pieces = pieces + (query,)  # noqa: RUF005  Triton unpacks no tuple
    wait(found, pairs & 1)
    rows = gl.arange(0, QUERIES, gl.SliceLayout(1, LOADED))[:, None]
    matrices = keys.reinterpret(dtype, [HEAD, HEAD], HALF_SHARED)
    features = values.reinterpret(dtype, [QUERIES, HEAD], HALF_SHARED)
    async_copy.async_load(matrices, folded + head * (HEAD * HEAD) + (rows * HEAD + lane[None, :]))
    async_copy.commit_group()
    wait(added, pairs & 1)
    gl.barrier()
    for piece in gl.static_range(QUERIES // PIECE):
        feature = features_of(pieces[piece].to(gl.float32), key_mass)
        features.slice(piece * PIECE, PIECE).store(feature.to(dtype))
    async_copy.wait_group(0)
    fence_async_shared()
    gl.barrier()
    linear = logits.reinterpret(gl.float32, [QUERIES, HEAD], SUMS)
    multiply(features, matrices, linear, False, found)
    wait(found, pairs + 1 & 1)
    gl.inline_asm("tcgen05.fence::after_thread_sync;")
    inverse = 1.0 / total
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    for half in gl.static_range(2):
        x = sums.slice(half * KEYS, KEYS).load(layout) * inverse[:, None]
        scale, offset = scales.slice(half * KEYS, KEYS).load(columns), biases.slice(half * KEYS, KEYS).load(columns)
        x = gl.fma(x, scale[None, :], linear.slice(half * KEYS, KEYS).load(layout)) + offset[None, :]
        features.slice(half * KEYS, KEYS, 1).store(x.to(dtype))
    gl.barrier()
    stored: gl.constexpr = BYTES_STORED if y_scale is not None else HALF_STORED
    rows = gl.arange(0, QUERIES, gl.SliceLayout(1, stored))[:, None]
    result = features.load(stored)
    if y_scale is not None:
        result = result.to(gl.float32)
        inside = gl.where(rows < left, gl.abs(result), 0.0)
        amax = gl.maximum(gl.max(inside.reshape((QUERIES * HEAD,)), 0), 1e-8)
        gl.store(y_scale + block.to(gl.int64) * H + head, amax * (1.0 / 128.0))
        result = whole_steps(gl.minimum(result * divided(128.0, amax), 127.0))
    place = rows * (H * HEAD) + gl.arange(0, HEAD, gl.SliceLayout(0, stored))[None, :]
    gl.store(y + (start * (H * HEAD) + head * HEAD + place), result, mask=rows < left)
    barriers._keep_alive()
