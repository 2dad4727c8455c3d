"""The sparse attention of `sparse_linear_attention.kernel` in Gluon, for `wgmma` of sm_90, with int8 queries and keys and
fp8 probabilities and values. Letters as there.

Two warpgroups of 64 queries run at their own pace. While one takes exponentials, the other multiplies, and each asks for
the next block's products of queries and keys before it takes the exponentials of the present one. So no barrier may hold
both, and none is in the loop:

- Every thread copies its part of block i + AHEAD in iteration i, and arrives at the mbarrier of that block's slot when its
  copies do.
- A thread waits at the mbarrier of block i + 1 in iteration i. Every other thread then has begun iteration i + 1 - AHEAD
  at least, so nobody reads block i - AHEAD any more, and its slot takes block i + AHEAD: there are 2 AHEAD slots.

Triton would put barriers around copies, waits at mbarriers and waits for products, so these are written in PTX.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from wanforge.plugins.quantiser.kernel import ROUND, ROUND_TO_BFLOAT16, TO_E4M3

HEAD = gl.constexpr(128)
QUERIES = gl.constexpr(128)
KEYS = gl.constexpr(64)
THREADS = gl.constexpr(256)
LOG2E = gl.constexpr(1.4426950408889634)
SOFTMAX_SCALE = gl.constexpr(0.08838834764831845 * 1.4426950408889634)
OFFSET = gl.constexpr(8.807)

LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 32]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 32]))
HALF_SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16]))
LOGIT_ROWS = gl.constexpr(gl.SliceLayout(1, LOGITS))
SUM_ROWS = gl.constexpr(gl.SliceLayout(1, SUMS))
LOADED = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [8, 1], [1, 0]))
STORED = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0]))
EACH = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
BYTES_SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))
NARROW_SHARED = gl.constexpr(gl.NVMMASharedLayout(64, 8, 2))
PLAIN_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
HALF_SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def power(x):
    """2 to the x, where what a float32 holds with fewer digits becomes zero."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def divided(x, y):
    """x / y, rounded to nearest even."""
    return gl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def whole_steps(x):
    """`quantiser.kernel.whole_steps`."""
    return (x + ROUND).to(gl.int32, bitcast=True).to(gl.int8)


@gluon.jit
def to_e4m3(x):
    """x in fp8, rounded to nearest even and clamped to its range."""
    return gl.inline_asm_elementwise(
        TO_E4M3,
        "=r,f,f,f,f",
        [x],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """x rounded to `dtype`, as float32."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            ROUND_TO_BFLOAT16,
            "=f,=f,f,f",
            [x],
            dtype=gl.float32,
            is_pure=True,
            pack=2,
        )
    return x.to(dtype).to(gl.float32)


@gluon.constexpr_function
def wait_for_all(outputs, inputs):
    return "wgmma.wait_group.sync.aligned 0;"


@gluon.constexpr_function
def wait_for_first(outputs, inputs):
    return "wgmma.wait_group.sync.aligned 1;"


@gluon.constexpr_function
def in_place(kind, count):
    """Constraints of results that lie in the registers of the operands."""
    return ",".join([f"={kind}"] * count + [str(i) for i in range(count)])


@builtin
def registers(product, _semantic=None):
    """The registers of a product that may not be complete yet."""
    return gl.tensor(product.handle, product.type.tensor_type)


@gluon.jit
def address(buffer):
    """Where a buffer lies in shared memory."""
    return gl.inline_asm("mov.b32 $0, $1;", "=r,r", [buffer], gl.int32)


@gluon.jit
def wait(barrier, phase):
    """Wait until a phase of the mbarrier at an address is complete."""
    gl.inline_asm(
        """{
        .reg .pred complete;
        waiting:
        mbarrier.try_wait.parity.shared.b64 complete, [$0], $1;
        @!complete bra.uni waiting;
        }""",
        "r,r",
        [barrier, phase],
    )


@gluon.jit
def copy(slot, chosen, is_wanted, to, origin):
    """Begin the copies of one thread, if they are wanted, and arrive at the mbarrier of their slot once they do.

    `to` are the addresses of its keys, its values and of the first mbarrier; `origin` points at its keys, its values, and
    its values of the other half of the channels.
    """
    gl.inline_asm(
        """{
        .reg .pred wanted;
        .reg .b32 key, value;
        .reg .b64 keys, values, others;
        setp.ne.b32 wanted, $7, 0;
        mad.lo.s32 key, $6, 8192, $0;
        mad.lo.s32 value, $6, 8192, $1;
        mad.wide.s32 keys, $5, 8192, $2;
        mad.wide.s32 values, $5, 64, $3;
        mad.wide.s32 others, $5, 64, $4;
        @wanted cp.async.cg.shared.global [key], [keys], 16;
        @wanted cp.async.cg.shared.global [key + 4096], [keys + 4096], 16;
        @wanted cp.async.cg.shared.global [value], [values], 16;
        @wanted cp.async.cg.shared.global [value + 4096], [others], 16;
        }""",
        "r,r,l,l,l,r,r,r",
        [to[0], to[1], origin[0], origin[1], origin[2], chosen, slot, is_wanted.to(gl.int32)],
    )
    gl.inline_asm("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", "r", [to[2] + 8 * slot])


@gluon.jit
def key_of(column):
    """The key of a column of the products. A thread's columns are those keys whose probabilities it has to hold for the
    next product, so that they need not be exchanged."""
    return (column & 49) | ((column & 6) << 1) | ((column & 8) >> 2)


@gluon.jit
def as_operand(p):
    """Probabilities [QUERIES, KEYS] in fp8, in the order of the keys; the inverse of `key_of`."""
    p = p.reshape((QUERIES, KEYS // 16, 2, 4, 2)).permute((0, 1, 3, 2, 4)).reshape((QUERIES, KEYS))
    return to_e4m3(gl.convert_layout(p, gl.DotOperandLayout(0, SUMS, 4), assert_trivial=True))


@gluon.jit
def multiply(a, b, start, counts: gl.constexpr):
    """The product of a [M, K] and b [N, K], added to `start` if that counts, begun."""
    return warpgroup_mma(a, b.permute((1, 0)), start, use_acc=counts, is_async=True)


@gluon.jit
def attention(
    q, k, k_step, v, v_scale, selected, folded, folded_mass, bias, y, y_scale,
    L, q_stride, padded, M, N, num_selected,
    H: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """`sparse_linear_attention.kernel.attention` of 128 queries by 64 keys with `sage_fp8`."""
    SLOTS: gl.constexpr = 2 * AHEAD
    block, head = gl.program_id(0), gl.program_id(1).to(gl.int64)
    dtype: gl.constexpr = q.dtype.element_ty
    k_step += head * N
    selected += (head * M + block) * num_selected
    last = num_selected - 1
    # What is needed soon is asked for at once, because each answer takes as long as hundreds of instructions.
    chosen = ()
    for i in gl.static_range(AHEAD + 1):
        chosen += (gl.load(selected + gl.minimum(i, last)),)
    last_chosen = gl.load(selected + last)
    rows = gl.arange(0, QUERIES, gl.SliceLayout(1, LOADED))[:, None]
    lanes = gl.arange(0, HEAD, gl.SliceLayout(0, LOADED))[None, :]
    start = block.to(gl.int64) * QUERIES
    inside = rows < L - block * QUERIES
    query = gl.load(q + start * q_stride + head * HEAD + (rows * q_stride + lanes), mask=inside, other=0.0)
    key_mass = gl.load(folded_mass + head * HEAD + lanes)
    thread = gl.arange(0, THREADS, EACH)
    channel_scale = gl.load(v_scale + head * HEAD + thread % HEAD)
    channel_bias = gl.load(bias + thread % HEAD).to(gl.float32)

    keys = gl.allocate_shared_memory(gl.int8, [SLOTS, KEYS, HEAD], BYTES_SHARED)
    values = gl.allocate_shared_memory(gl.float8e4nv, [SLOTS, HEAD, KEYS], NARROW_SHARED)
    barriers = mbarrier.allocate_mbarrier(batch=SLOTS)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=THREADS)
    gl.barrier()
    row, channel = thread // 8, thread // 4
    origin = (
        k + head * padded * HEAD + (key_of(row) * HEAD + thread % 8 * 16),
        v + head * padded * HEAD + (channel * padded + thread % 4 * 16),
        v + head * padded * HEAD + ((channel + HEAD // 2) * padded + thread % 4 * 16),
    )
    arrived = address(barriers)
    to = (
        address(keys) + row * HEAD + (thread % 8 ^ row % 8) * 16,
        address(values) + channel * KEYS + (thread % 4 ^ channel // 2 % 4) * 16,
        arrived,
    )
    first_step = gl.load(k_step + chosen[0])
    next_step = gl.load(k_step + chosen[1])
    for i in gl.static_range(AHEAD):
        copy(i, chosen[i], i < num_selected, to, origin)
    matrices = gl.allocate_shared_memory(dtype, [HEAD, HEAD], HALF_SHARED)
    async_copy.async_load(matrices, folded + head * (HEAD * HEAD) + (rows * HEAD + lanes))
    async_copy.commit_group()
    later, ahead = chosen[2], chosen[AHEAD]

    scales = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, channel_scale)
    biases = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, channel_bias)
    query = query.to(gl.float32)
    q_step = divided(gl.max(gl.abs(query).reshape((QUERIES * HEAD,)), 0), 127.0) + 1e-7
    steps = whole_steps(query * (divided(1.0, q_step) * 1.00000012))
    queries = gl.allocate_shared_memory(gl.int8, [QUERIES, HEAD], BYTES_SHARED, steps)
    feature = power(gl.fma(query, LOG2E, gl.max(query, 1, keep_dims=True) * -LOG2E))
    mass = gl.sum(feature * key_mass, 1, keep_dims=True)
    feature *= 1.0 / (mass + 1e-5 * gl.sum(feature, 1, keep_dims=True))
    features = gl.allocate_shared_memory(dtype, [QUERIES, HEAD], HALF_SHARED, feature.to(dtype))
    fence_async_shared()
    gl.barrier()
    queries = queries.load(gl.DotOperandLayout(0, LOGITS, 4))

    scale = SOFTMAX_SCALE * q_step
    step = scale * first_step
    whole = gl.zeros([QUERIES, KEYS], gl.int32, LOGITS)
    zeros = gl.zeros([QUERIES, HEAD], gl.float32, SUMS)
    maximum = gl.full([QUERIES], -float("inf"), gl.float32, LOGIT_ROWS)
    total = gl.zeros([QUERIES], gl.float32, LOGIT_ROWS)
    output, sums = zeros, zeros
    wait(arrived, 0)
    fence_async_shared()
    products = multiply(queries, keys.index(0), whole, False)
    logits = gl.inline_asm(wait_for_all, in_place("r", 32), [registers(products)], whole.type).to(gl.float32)
    higher = gl.max(logits, 1) * step
    # Two values: Triton takes a variable for constant that a loop sets to what was the same value before it.
    before = gl.zeros([QUERIES], gl.float32, LOGIT_ROWS)
    shrink = gl.zeros([QUERIES], gl.float32, LOGIT_ROWS)

    # Each block is summed separately, because tensor cores accumulate fp8 products with few bits. Its sum is added in the
    # next iteration, while exponentials are taken.
    for i in range(num_selected - 1):
        wait(arrived + 8 * (i + 1 & SLOTS - 1), (i + 1) // SLOTS & 1)
        fence_async_shared()
        products = multiply(queries, keys.index(i + 1 & SLOTS - 1), whole, False)
        p = power(gl.fma(logits, step, (OFFSET - higher)[:, None]))
        output = gl.fma(output, gl.convert_layout(before, SUM_ROWS)[:, None], sums)
        before = shrink
        total = gl.fma(total, shrink, gl.sum(p, 1))
        maximum = higher
        weighted = multiply(as_operand(p), values.index(i & SLOTS - 1), zeros, False)
        copy(i + AHEAD & SLOTS - 1, ahead, i + AHEAD < num_selected, to, origin)
        ahead = gl.load(selected + gl.minimum(i + 1 + AHEAD, last))
        step = scale * next_step
        next_step = gl.load(k_step + later)
        later = gl.load(selected + gl.minimum(i + 3, last))
        logits = gl.inline_asm(wait_for_first, in_place("r", 32), [registers(products)], whole.type).to(gl.float32)
        higher = gl.maximum(maximum, gl.max(logits, 1) * step)
        shrink = power(maximum - higher)
        sums = gl.inline_asm(wait_for_all, in_place("f", 64), [registers(weighted)], zeros.type)

    # Only the last block may have keys past the end.
    key = key_of(gl.arange(0, KEYS, gl.SliceLayout(0, LOGITS)))
    logits = gl.where((key < L - last_chosen * KEYS)[None, :], logits, -float("inf"))
    higher = gl.maximum(maximum, gl.max(logits, 1) * step)
    p = power(gl.fma(logits, step, (OFFSET - higher)[:, None]))
    output = gl.fma(output, gl.convert_layout(before, SUM_ROWS)[:, None], sums)
    shrink = power(maximum - higher)
    total = gl.fma(total, shrink, gl.sum(p, 1))
    weighted = multiply(as_operand(p), values.index(last & SLOTS - 1), zeros, False)
    sums = gl.inline_asm(wait_for_all, in_place("f", 64), [registers(weighted)], zeros.type)
    output = gl.fma(output, gl.convert_layout(shrink, SUM_ROWS)[:, None], sums)

    # The linear branch is added to the sparse one and rounded once, where the reference rounds three times.
    output *= gl.convert_layout(1.0 / total, SUM_ROWS)[:, None]
    output *= scales.slice(0, HEAD).load(gl.SliceLayout(0, SUMS))[None, :]
    async_copy.wait_group(0)
    fence_async_shared()
    output = gl.convert_layout(output, HALF_SUMS, assert_trivial=True)
    output = warpgroup_mma(features, matrices, output)
    output = gl.convert_layout(output, SUMS, assert_trivial=True)
    output = rounded(output + biases.slice(0, HEAD).load(gl.SliceLayout(0, SUMS))[None, :], dtype)
    rows = gl.arange(0, QUERIES, SUM_ROWS)[:, None]
    stored_rows = gl.arange(0, QUERIES, gl.SliceLayout(1, STORED))[:, None]
    stored = stored_rows * (H * HEAD) + gl.arange(0, HEAD, gl.SliceLayout(0, STORED))[None, :]
    y += start * (H * HEAD) + head * HEAD
    if y_scale is not None:
        output = gl.where(rows < L - block * QUERIES, output, 0.0)
        amax = gl.maximum(gl.max(gl.abs(output).reshape((QUERIES * HEAD,)), 0), 1e-8)
        steps = whole_steps(gl.minimum(output * divided(128.0, amax), 127.0))
        gl.store(y + stored, gl.convert_layout(steps, STORED), mask=stored_rows < L - block * QUERIES)
        gl.store(y_scale + block.to(gl.int64) * H + head, amax * (1.0 / 128.0))
    else:
        gl.store(y + stored, gl.convert_layout(output.to(dtype), STORED), mask=stored_rows < L - block * QUERIES)
    barriers._keep_alive()
