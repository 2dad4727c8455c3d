"""The sparse attention of `sparse_linear_attention.kernel` in Gluon, for `wgmma` of sm_90, with int8 queries and keys and
fp8 probabilities and values. Letters as there.

Blocks of keys are taken in pairs, which share a maximum, so that outputs and totals are shrunk once for 128 keys. Each
of two warpgroups of 64 queries asks for the next pair's products of queries and keys as soon as the registers of the
present ones are free. They take exponentials in turn, so that one does while the products of the other run: a barrier of
its own holds a warpgroup until the other has arrived there. No barrier in the loop makes both wait:

- One thread begins the bulk copies of pair i + AHEAD in iteration i, and their bytes arrive at the mbarrier of that pair's
  slot. So does every warp, at the beginning of iteration i.
- A thread waits at the mbarrier of pair i + 1 in iteration i. Every warp then has begun iteration i + 1 - AHEAD at least, so
  nobody reads pair i - AHEAD any more, and its slot takes pair i + AHEAD: there are 2 AHEAD slots.

The folded matrices of the linear branch are copied in the same way, behind the first pair, because they are waited for
before the second.

Triton would put barriers around copies, waits at mbarriers and waits for products, so these are written in PTX. Only the
first warp comes to the copies, since their addresses are work for all that do.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from wanforge.plugins.block_quantiser.kernel import RECIPROCAL
from wanforge.plugins.quantiser.kernel import ROUND, ROUND_TO_BFLOAT16, TO_E4M3

HEAD = gl.constexpr(128)
QUERIES = gl.constexpr(128)
KEYS = gl.constexpr(64)
THREADS, WARPS = gl.constexpr(256), gl.constexpr(8)
PAIRS = gl.constexpr(32)
"""Pairs of queries that a thread has."""
AHEAD = gl.constexpr(2)
SLOTS = gl.constexpr(4)
LOG2E = gl.constexpr(1.4426950408889634)
SOFTMAX_SCALE = gl.constexpr(0.08838834764831845 * 1.4426950408889634)
OFFSET = gl.constexpr(8.807)

LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 32]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 32]))
HALF_SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16]))
LOGIT_ROWS = gl.constexpr(gl.SliceLayout(1, LOGITS))
SUM_ROWS = gl.constexpr(gl.SliceLayout(1, SUMS))
PAIRS_LOADED = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0]))
LOADED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
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
def reciprocal(x):
    """`block_quantiser.kernel.reciprocal`."""
    return gl.inline_asm_elementwise(RECIPROCAL, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


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
def wait_for_sums(outputs, inputs):
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
def warp_number():
    """The number of a thread's warp, of which the assembler knows that it is the same for the whole warp."""
    return gl.inline_asm(
        """{
        .reg .b32 number;
        mov.u32 number, %tid.x;
        shr.u32 number, number, 5;
        shfl.sync.idx.b32 $0, number, 0, 31, -1;
        }""",
        "=r",
        [],
        gl.int32,
    )


@gluon.constexpr_function
def bulk_copy(dimensions, to, box):
    """PTX of a bulk copy by the elected thread, whose bytes arrive at `barrier`. `box` is a tensor map and coordinates."""
    into = f"cp.async.bulk.tensor.{dimensions}d.shared::cluster.global.mbarrier::complete_tx::bytes"
    return f"@elected {into} [{to}], [{box}], [barrier];"


@gluon.constexpr_function
def copies_of_pair(outputs, inputs):
    """PTX of the thread that copies a pair of blocks, which is elected of the first warp. The tensor maps of keys, values
    and matrices are the first parameters of `attention`, with the numbers 0, 11 and 16; each is followed by the sizes and
    the strides of its view, of five, two and two dimensions."""
    lines = [
        "{",
        ".reg .pred wanted, first, elected;",
        ".reg .b32 barrier, to, block, lane;",
        ".reg .b64 keys, values;",
        "setp.ne.b32 wanted, $1, 0;",
        "setp.eq.u32 first, $5, 0;",
        "and.pred wanted, wanted, first;",
        "@!wanted bra.uni copied;",
        "elect.sync lane|elected, -1;",
        "cvta.param.u64 keys, attention_param_0;",
        "cvta.param.u64 values, attention_param_11;",
        "mad.lo.s32 barrier, $0, 8, $4;",
        "@elected mbarrier.arrive.expect_tx.shared::cta.b64 _, [barrier], 32768;",
    ]
    for half, chosen in enumerate(("$6", "$7")):
        lines += [
            f"mad.lo.s32 to, $0, 16384, $2; add.s32 to, to, {8192 * half};",
            f"mad.lo.s32 block, {chosen}, 4, $8;",
            bulk_copy(5, "to", "keys, {0, 0, 0, 0, block}"),
        ]
    for half, chosen in enumerate(("$6", "$7")):
        lines += [
            f"mad.lo.s32 to, $0, 16384, $3; add.s32 to, to, {8192 * half};",
            f"shl.b32 block, {chosen}, 6;",
            bulk_copy(2, "to", "values, {block, $9}"),
        ]
    return "\n".join([*lines, "copied:", "}"])


@gluon.jit
def copy(slot, chosen, is_wanted, to, origin):
    """Copy a pair of blocks, if they are wanted, and let their bytes arrive at the mbarrier of their slot.

    `to` are the addresses of the keys, the values and the first mbarrier, and the warp's number; `origin` is where the head
    begins in the views of the keys and of the values.
    """
    gl.inline_asm(
        copies_of_pair,
        "r,r,r,r,r,r,r,r,r,r",
        [slot, is_wanted.to(gl.int32), to[0], to[1], to[2], to[3], chosen[0], chosen[1], origin[0], origin[1]],
    )


@gluon.constexpr_function
def copies_of_matrices(outputs, inputs):
    """PTX of the thread that copies the folded matrices of a head, in two parts of 64 columns."""
    lines = [
        "{",
        ".reg .pred first, elected;",
        ".reg .b32 barrier, half, other, lane;",
        ".reg .b64 folded;",
        "setp.eq.u32 first, $2, 0;",
        "@!first bra.uni copied;",
        "elect.sync lane|elected, -1;",
        "cvta.param.u64 folded, attention_param_16;",
        "mov.b32 barrier, $1;",
        "mov.b32 half, 64;",
        "add.s32 other, $0, 16384;",
        "@elected mbarrier.arrive.expect_tx.shared::cta.b64 _, [barrier], 32768;",
        bulk_copy(2, "$0", "folded, {0, $3}"),
        bulk_copy(2, "other", "folded, {half, $3}"),
    ]
    return "\n".join([*lines, "copied:", "}"])


@gluon.jit
def copy_matrices(to, barrier, warp, first_row):
    """Copy the folded matrices of a head to an address, and let their bytes arrive at an mbarrier."""
    gl.inline_asm(copies_of_matrices, "r,r,r,r", [to, barrier, warp, first_row])


@gluon.jit
def arrive(barrier):
    """Let a warp arrive at the mbarrier at an address."""
    gl.inline_asm(
        """{
        .reg .pred elected;
        .reg .b32 lane;
        bar.warp.sync -1;
        elect.sync lane|elected, -1;
        @elected mbarrier.arrive.shared.b64 _, [$0];
        }""",
        "r",
        [barrier],
    )


@gluon.constexpr_function
def widening(dtype, pair, low, high):
    """PTX of the two float32 of a pair."""
    if dtype == gl.bfloat16:
        return f"shl.b32 {low}, {pair}, 16; and.b32 {high}, {pair}, 0xffff0000;"
    return f"{{ .reg .b16 a, b; mov.b32 {{a, b}}, {pair}; cvt.f32.f16 {low}, a; cvt.f32.f16 {high}, b; }}"


@gluon.jit
def load_pairs(q, q_stride, rows):
    """The queries of a program, two in a word [QUERIES, HEAD / 2], and zeros in place of those beyond so many rows. The
    compiler would take pairs apart as soon as they are there, and `largest_of_pairs` wants them together."""
    row = gl.arange(0, QUERIES, gl.SliceLayout(1, PAIRS_LOADED))[:, None]
    column = gl.arange(0, HEAD // 2, gl.SliceLayout(0, PAIRS_LOADED))[None, :]
    words = q.to(gl.pointer_type(gl.int32), bitcast=True)
    return gl.load(words + (row * (q_stride // 2) + column), mask=row < rows, other=0)


@gluon.jit
def widened(words, dtype: gl.constexpr):
    """Pairs of queries as float32 [QUERIES, HEAD]."""
    PTX: gl.constexpr = widening(dtype, "$2", "$0", "$1")
    low, high = gl.inline_asm_elementwise(
        PTX, "=f,=f,r", [words], dtype=(gl.float32, gl.float32), is_pure=False, pack=1
    )
    return gl.convert_layout(gl.join(low, high).reshape((QUERIES, HEAD)), LOADED, assert_trivial=True)


@gluon.constexpr_function
def largest_magnitude(dtype):
    """PTX of the largest magnitude of a thread's pairs of queries, which come with any sign until the end."""
    name, count = "bf16x2" if dtype == gl.bfloat16 else "f16x2", PAIRS.value
    lines = ["{", ".reg .b32 most0, most1, most2, most3;"]
    lines += [f"mov.b32 most{i}, ${i + 1};" for i in range(4)]
    lines += [f"max.xorsign.abs.{name} most{i % 4}, most{i % 4}, ${i + 1};" for i in range(4, count)]
    lines += [f"max.xorsign.abs.{name} most{i}, most{i}, most{j};" for i, j in ((0, 1), (2, 3), (0, 2))]
    lines += [widening(dtype, "most0", "most1", "most2"), "abs.f32 most1, most1;", "abs.f32 most2, most2;"]
    return "\n".join([*lines, "max.f32 $0, most1, most2;", "}"])


@gluon.jit
def largest_of_pairs(words, dtype: gl.constexpr):
    """The largest magnitude of the pairs that each thread has, [THREADS]."""
    threads = gl.arange(0, THREADS, EACH).to(gl.float32)
    return gl.inline_asm(largest_magnitude(dtype), "=f" + PAIRS * ",r", [words], threads.type)


@gluon.constexpr_function
def largest_of_all(outputs, inputs):
    """PTX of the largest of what all threads have. Numbers that are not negative are in the order of their bits."""
    values, (scratch,), (warp,) = inputs
    lines = [
        "{",
        ".reg .pred first;",
        ".reg .b32 most, place, a, b, c, d;",
        f"mov.b32 most, {values[0]};",
        *(f"max.f32 most, most, {each};" for each in values[1:]),
        "redux.sync.max.u32 most, most, -1;",
        "mov.u32 place, %tid.x;",
        "and.b32 place, place, 31;",
        "setp.eq.u32 first, place, 0;",
        f"mad.lo.s32 place, {warp}, 4, {scratch};",
        "@first st.shared.b32 [place], most;",
        "bar.sync 0;",
    ]
    for place in (f"[{scratch}]", f"[{scratch}+16]"):
        lines += [
            f"ld.shared.v4.b32 {{a, b, c, d}}, {place};",
            "max.f32 a, a, b;",
            "max.f32 c, c, d;",
            "max.f32 a, a, c;",
            "max.f32 most, most, a;",
        ]
    return "\n".join([*lines, f"mov.b32 {outputs[0][0]}, most;", "}"])


@gluon.jit
def largest(x, scratch, warp):
    """The largest of what all threads have, none of which is negative, given the address of 32 bytes that nobody uses. All
    threads meet at a barrier."""
    COUNT: gl.constexpr = x.numel // THREADS
    return gl.inline_asm(largest_of_all, "=f" + COUNT * ",f" + ",r,r", [x, scratch, warp], gl.float32)


@gluon.constexpr_function
def wait_for_turn(outputs, inputs):
    return """{
        .reg .b32 number;
        or.b32 number, $2, $3;
        and.b32 number, number, 1;
        max.u32 number, number, $4;
        bar.sync number, 256;
        }"""


@gluon.jit
def turn(maximum, group):
    """The maxima of a thread's queries, once it is the turn of its warpgroup.

    The barrier has the number of the warpgroup, which is 2 or 3. The larger of that and a bit of the maxima is the same
    number, but makes the assembler find the maxima before it waits.
    """
    return gl.inline_asm(wait_for_turn, "=f,=f,0,1,r", [maximum, group], maximum.type)


@gluon.jit
def pass_turn(group):
    """Let the other warpgroup have its turn, at the barrier of its number."""
    gl.inline_asm(
        """{
        .reg .b32 other;
        xor.b32 other, $0, 1;
        bar.arrive other, 256;
        }""",
        "r",
        [group],
    )


@gluon.jit
def give_first_turn(group):
    """Let warpgroup 3 give warpgroup 2 its first turn."""
    gl.inline_asm(
        """{
        .reg .pred is_second;
        .reg .b32 other;
        setp.eq.u32 is_second, $0, 3;
        xor.b32 other, $0, 1;
        @is_second bar.arrive other, 256;
        }""",
        "r",
        [group],
    )


@gluon.jit
def take_last_turn(group):
    """Let warpgroup 2 take the turn that nobody needs, because nothing may be left at a barrier."""
    gl.inline_asm(
        """{
        .reg .pred is_first;
        setp.eq.u32 is_first, $0, 2;
        @is_first bar.sync $0, 256;
        }""",
        "r",
        [group],
    )


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
def chosen_of(selected, pair, last):
    """The indices of a pair of blocks; what would come after the last block is the last one again."""
    return gl.load(selected + gl.minimum(2 * pair, last)), gl.load(selected + gl.minimum(2 * pair + 1, last))


@gluon.jit
def steps_of(k_step, chosen):
    """The steps of the keys of a pair of blocks."""
    return gl.load(k_step + chosen[0]), gl.load(k_step + chosen[1])


@gluon.jit
def scaled(scale, steps):
    """The steps of a pair of blocks times a scale."""
    return scale * steps[0], scale * steps[1]


@gluon.jit
def begin(queries, keys, block):
    """The products of queries and the keys of a block in shared memory, begun."""
    return multiply(queries, keys.index(block), gl.zeros([QUERIES, KEYS], gl.int32, LOGITS), False)


@gluon.jit
def complete(first, second):
    """The products of a pair of blocks, once all products are complete."""
    first, second = registers(first), registers(second)
    return gl.inline_asm(wait_for_all, in_place("r", 64), [first, second], [first.type, second.type])


@gluon.jit
def by_lane(x):
    """x [QUERIES, N] as [QUERIES, 2, N // 8, 4], of which a thread holds all but the last axis."""
    return x.reshape((QUERIES, x.shape[1] // 8, 4, 2)).permute((0, 3, 1, 2))


@gluon.jit
def largest_logits(logits, step):
    """The largest of the logits that each thread has of a row, [QUERIES, 4]."""
    return gl.max(gl.max(by_lane(logits), 1), 1).to(gl.float32) * step


@gluon.jit
def raised(maximum, logits, steps):
    """The largest logit of each query so far, [QUERIES]."""
    found = gl.maximum(largest_logits(logits[0], steps[0]), largest_logits(logits[1], steps[1]))
    return gl.maximum(maximum, gl.convert_layout(gl.max(found, 1), LOGIT_ROWS, assert_trivial=True))


@gluon.jit
def exponentials(logits, step, maximum):
    """The probabilities of a block, relative to a maximum."""
    return power(gl.fma(logits.to(gl.float32), step, (OFFSET - maximum)[:, None]))


@gluon.jit
def summed(p):
    """The sum of the probabilities that each thread has of a row, [QUERIES, 4]."""
    return gl.sum(gl.sum(by_lane(p), 1), 1)


@gluon.jit
def shrunk(x, factor, y):
    """x [QUERIES, C] times a factor of each row, plus y."""
    rows: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    return gl.fma(x, gl.convert_layout(factor, rows, assert_trivial=True)[:, None], y)


@gluon.jit
def weigh(p, values, block, start, counts: gl.constexpr):
    """The sum of the values of a block in shared memory with the weights p, added to `start` if that counts, begun."""
    return multiply(as_operand(p), values.index(block), start, counts)


@gluon.jit
def attention(
    k, v, folded, q, k_step, v_scale, selected, folded_mass, bias, y, y_scale,
    L, q_stride, padded, M, N, num_selected,
    H: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """`sparse_linear_attention.kernel.attention` of 128 queries by 64 keys with `sage_fp8`. With EARLY, an iteration begins
    its copies before the softmax, otherwise in the middle of it."""
    block, head = gl.program_id(0), gl.program_id(1).to(gl.int64)
    dtype: gl.constexpr = q.dtype.element_ty
    k_step += head * N
    selected += (head * M + block) * num_selected
    last, pairs = num_selected - 1, (num_selected + 1) // 2
    keys = gl.allocate_shared_memory(gl.int8, [2 * SLOTS, KEYS, HEAD], BYTES_SHARED)
    values = gl.allocate_shared_memory(gl.float8e4nv, [2 * SLOTS, HEAD, KEYS], NARROW_SHARED)
    matrices = gl.allocate_shared_memory(dtype, [HEAD, HEAD], HALF_SHARED)
    barriers = mbarrier.allocate_mbarrier(batch=SLOTS + 1)  # the last is that of the matrices
    for slot in gl.static_range(SLOTS + 1):
        mbarrier.init(barriers.index(slot), count=WARPS + 1)
    fence_async_shared()
    # What is needed soon is asked for at once, because each answer takes as long as hundreds of instructions.
    chosen = ()
    for i in gl.static_range(AHEAD + 1):
        chosen += (chosen_of(selected, i, last),)
    gl.barrier()
    arrived, warp = address(barriers), warp_number()
    to = address(keys), address(values), arrived, warp
    origin = gl.program_id(1) * (padded // 16), gl.program_id(1) * HEAD
    for i in gl.static_range(AHEAD):
        copy(i, chosen[i], i < pairs, to, origin)
        arrive(arrived + 8 * i)
        if i == 0:
            copy_matrices(address(matrices), arrived + 8 * SLOTS, warp, origin[1])
            arrive(arrived + 8 * SLOTS)
    start = block.to(gl.int64) * QUERIES
    words = load_pairs(q + start * q_stride + head * HEAD, q_stride, L - block * QUERIES)
    first_steps = steps_of(k_step, chosen[0])
    next_steps = steps_of(k_step, chosen[1])
    ahead = chosen[AHEAD]
    amax, query = largest_of_pairs(words, dtype), widened(words, dtype)

    scratch = gl.allocate_shared_memory(gl.float32, [2 * WARPS], PLAIN_SHARED)
    q_step = divided(largest(amax, address(scratch), warp), 127.0) + 1e-7
    steps = whole_steps(query * (divided(1.0, q_step) * 1.00000012))
    queries = gl.allocate_shared_memory(gl.int8, [QUERIES, HEAD], BYTES_SHARED, steps)
    fence_async_shared()
    gl.barrier()

    scale = SOFTMAX_SCALE * q_step
    step = scaled(scale, first_steps)
    zeros = gl.zeros([QUERIES, HEAD], gl.float32, SUMS)
    maximum = gl.full([QUERIES], -float("inf"), gl.float32, LOGIT_ROWS)
    total = summed(gl.zeros([QUERIES, KEYS], gl.float32, LOGITS))
    output = zeros
    group = warp // 4 + 2
    give_first_turn(group)
    wait(arrived, 0)
    first, second = begin(queries, keys, 0), begin(queries, keys, 1)

    # The features of the linear branch are found while these products run.
    lanes = gl.arange(0, HEAD, gl.SliceLayout(0, LOADED))[None, :]
    key_mass = gl.load(folded_mass + head * HEAD + lanes)
    thread = gl.arange(0, THREADS, EACH)
    channel_scale = gl.load(v_scale + head * HEAD + thread % HEAD)
    channel_bias = gl.load(bias + thread % HEAD)
    final = chosen_of(selected, pairs - 1, last)
    feature = power(gl.fma(query, LOG2E, gl.max(query, 1, keep_dims=True) * -LOG2E))
    feature *= 1.0 / gl.sum(feature * (key_mass + 1e-5), 1, keep_dims=True)
    features = gl.allocate_shared_memory(dtype, [QUERIES, HEAD], HALF_SHARED, feature.to(dtype))
    scales = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, channel_scale)
    biases = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, channel_bias.to(gl.float32))
    wait(arrived + 8 * SLOTS, 0)
    fence_async_shared()
    gl.barrier()
    logits = complete(first, second)

    # The sum of each pair of blocks is added outside of the tensor cores, which accumulate fp8 products with few bits.
    for i in range(pairs - 1):
        present, following = 2 * (i & SLOTS - 1), 2 * (i + 1 & SLOTS - 1)
        wait(arrived + 8 * (i + 1 & SLOTS - 1), (i + 1) // SLOTS & 1)
        arrive(arrived + 8 * (i + AHEAD & SLOTS - 1))
        later_steps = steps_of(k_step, ahead)
        later = chosen_of(selected, i + 1 + AHEAD, last)
        if EARLY:
            copy(i + AHEAD & SLOTS - 1, ahead, i + AHEAD < pairs, to, origin)
        higher = turn(raised(maximum, logits, step), group)
        shrink = power(maximum - higher)
        maximum = higher
        p = exponentials(logits[0], step[0], higher)
        total = shrunk(total, shrink, summed(p))
        first = begin(queries, keys, following)
        sums = weigh(p, values, present, zeros, False)
        if not EARLY:
            copy(i + AHEAD & SLOTS - 1, ahead, i + AHEAD < pairs, to, origin)
        p = exponentials(logits[1], step[1], higher)
        total += summed(p)
        sums = weigh(p, values, present + 1, sums, True)
        pass_turn(group)
        second = begin(queries, keys, following + 1)
        step, next_steps, ahead = scaled(scale, next_steps), later_steps, later
        sums = gl.inline_asm(wait_for_sums, in_place("f", 64), [registers(sums)], zeros.type)
        output = shrunk(output, shrink, sums)
        logits = complete(first, second)

    # Only the last pair may lack a block, and only the last block may have keys past the end.
    key = key_of(gl.arange(0, KEYS, gl.SliceLayout(0, LOGITS)))[None, :]
    beyond = gl.where(num_selected % 2 == 0, L - final[1] * KEYS, 0)
    logits = (
        gl.where(key < L - final[0] * KEYS, logits[0].to(gl.float32), -float("inf")),
        gl.where(key < beyond, logits[1].to(gl.float32), -float("inf")),
    )
    present = 2 * (pairs - 1 & SLOTS - 1)
    higher = raised(maximum, logits, step)
    shrink = power(maximum - higher)
    p = exponentials(logits[0], step[0], higher)
    total = shrunk(total, shrink, summed(p))
    sums = weigh(p, values, present, zeros, False)
    p = exponentials(logits[1], step[1], higher)
    total = gl.sum(total + summed(p), 1)
    sums = weigh(p, values, present + 1, sums, True)
    sums = gl.inline_asm(wait_for_all, in_place("f", 64), [registers(sums)], zeros.type)
    output = shrunk(output, shrink, sums)

    # The linear branch is added to the sparse one and rounded once, where the reference rounds three times.
    output *= gl.convert_layout(1.0 / total, SUM_ROWS, assert_trivial=True)[:, None]
    output *= scales.slice(0, HEAD).load(gl.SliceLayout(0, SUMS))[None, :]
    output = gl.convert_layout(output, HALF_SUMS, assert_trivial=True)
    output = warpgroup_mma(features, matrices, output)
    take_last_turn(group)
    output = gl.convert_layout(output, SUMS, assert_trivial=True)
    output = rounded(output + biases.slice(0, HEAD).load(gl.SliceLayout(0, SUMS))[None, :], dtype)
    stored_rows = gl.arange(0, QUERIES, gl.SliceLayout(1, STORED))[:, None]
    stored = stored_rows * (H * HEAD) + gl.arange(0, HEAD, gl.SliceLayout(0, STORED))[None, :]
    y += start * (H * HEAD) + head * HEAD
    if y_scale is not None:
        of_rows = gl.max(gl.max(by_lane(gl.abs(output)), 1), 1)
        rows = gl.arange(0, QUERIES, gl.SliceLayout(1, of_rows.type.layout))[:, None]
        of_rows = gl.where(rows < L - block * QUERIES, of_rows, 0.0)
        amax = gl.maximum(largest(of_rows, address(scratch) + 4 * WARPS, warp), 1e-8)
        steps = whole_steps(gl.minimum(output * divided(128.0, amax), 127.0))
        gl.store(y + stored, gl.convert_layout(steps, STORED), mask=stored_rows < L - block * QUERIES)
        gl.store(y_scale + block.to(gl.int64) * H + head, amax * (1.0 / 128.0))
    else:
        gl.store(y + stored, gl.convert_layout(output.to(dtype), STORED), mask=stored_rows < L - block * QUERIES)
    # The compiler does not see that PTX uses shared memory until the end.
    keys._keep_alive()
    values._keep_alive()
    scratch._keep_alive()
    barriers._keep_alive()
    matrices._keep_alive()
