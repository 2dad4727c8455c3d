"""The sparse attention of `sparse_linear_attention.kernel` in Gluon, for `mma.sync`, with int8 queries and keys and fp8
probabilities and values. Letters as there.

A program has 128 queries on four warps, so that two programs fit on an SM: one multiplies while the other takes exponentials,
begins or ends. The outputs of a thread take 128 registers, so the queries are multiplied in two parts of 64, whose products
with a block of keys take 32 more. Shared memory holds the queries, and two blocks of keys and values: while one is
multiplied, the next is copied into the place of the one before.

Registers are what is scarce. Copies are written in PTX, because Triton would keep their addresses in registers, and
`zero_after` makes the assembler wait with loads whose results would have to be kept.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from wanforge.plugins.block_quantiser.kernel import BLOCK, INPUT_SCALE, LARGEST, LEAST_RATIO, SNAP, TO_E2M1
from wanforge.plugins.warpgroup_attention.kernel import (
    LOG2E,
    OFFSET,
    SOFTMAX_SCALE,
    divided,
    power,
    reciprocal,
    rounded,
    to_e4m3,
    whole_steps,
)

HEAD = gl.constexpr(128)
QUERIES = gl.constexpr(128)
PARTS = gl.constexpr(2)
PART = gl.constexpr(64)
"""Queries of a part."""
PIECE = gl.constexpr(16)
"""Queries whose features are found at a time."""
KEYS = gl.constexpr(64)
HALF = gl.constexpr(32)

SUMS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
ROWS = gl.constexpr(gl.SliceLayout(1, SUMS))
COLUMNS = gl.constexpr(gl.SliceLayout(0, SUMS))
BYTES_LEFT = gl.constexpr(gl.DotOperandLayout(0, SUMS, 4))
BYTES_RIGHT = gl.constexpr(gl.DotOperandLayout(1, SUMS, 4))
HALF_LEFT = gl.constexpr(gl.DotOperandLayout(0, SUMS, 2))
HALF_RIGHT = gl.constexpr(gl.DotOperandLayout(1, SUMS, 2))
HALF_LOADED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
BYTES_LOADED = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
HALF_STORED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
SCALES_STORED = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))
BYTES_SHARED = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))
VALUES_SHARED = gl.constexpr(gl.SwizzledSharedLayout(16, 2, 4, [1, 0]))
HALF_SHARED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))


@gluon.constexpr_function
def copies():
    """PTX of a thread's copies of a block of keys and of its values, as a group: pieces of 16 bytes of four keys and of four
    channels. Where they lie is worked out each time, because there are no registers to keep it."""
    lines = ["{", ".reg .b32 thread, row, piece, place, offset;", ".reg .b64 origin, far;", "mov.u32 thread, %tid.x;"]
    lines += ["shr.u32 row, thread, 3;", "xor.b32 piece, row, thread;", "and.b32 piece, piece, 7;"]
    lines += [
        "mad.lo.s32 place, $0, 8192, $2;",
        "mad.lo.s32 place, row, 128, place;",
        "mad.lo.s32 place, piece, 16, place;",
    ]
    lines += [
        "and.b32 piece, thread, 7;",
        "mad.wide.s32 origin, $1, 8192, $4;",
        "mad.wide.u32 origin, piece, 16, origin;",
    ]
    for i in range(4):
        lines += [
            f"add.s32 offset, row, {16 * i};",
            "min.s32 offset, offset, $7;",
            "mad.wide.s32 far, offset, 128, origin;",
            f"cp.async.cg.shared.global [place + {2048 * i}], [far], 16;",
        ]
    lines += ["shr.u32 row, thread, 2;", "shr.u32 piece, thread, 3;", "xor.b32 piece, piece, thread;"]
    lines += ["and.b32 piece, piece, 3;", "mad.lo.s32 place, $0, 8192, $3;", "mad.lo.s32 place, row, 64, place;"]
    lines += ["mad.lo.s32 place, piece, 16, place;", "and.b32 piece, thread, 3;", "mul.lo.s32 offset, row, $6;"]
    lines += ["mad.wide.s32 far, $1, 64, $5;", "mad.wide.u32 far, piece, 16, far;", "cvt.s64.s32 origin, offset;"]
    lines += ["add.s64 far, far, origin;", "mul.wide.s32 origin, $6, 32;"]
    for i in range(4):
        lines += [f"cp.async.cg.shared.global [place + {2048 * i}], [far], 16;"]
        lines += ["add.s64 far, far, origin;"] if i < 3 else []
    return "\n".join([*lines, "cp.async.commit_group;", "}"])


@gluon.jit
def copy(place, chosen, keys, values, k, v, padded, L):
    """Begin a thread's copies of a block of keys and of its values to a place in shared memory. Past the last key, where values
    are zero, that key is repeated."""
    last = L - 1 - chosen * KEYS
    gl.inline_asm(copies(), "r,r,r,r,l,l,r,r", [place, chosen, keys, values, k, v, padded, last])


@gluon.constexpr_function
def first_sign(outputs, inputs):
    return f"shr.u32 {outputs[0][0]}, {inputs[0][0]}, 31;"


@gluon.jit
def zero_after(x):
    """Zero [PART], once x [PART] is known, of which nothing is negative. Added to a place, it makes loads from there wait."""
    return gl.inline_asm(first_sign, ("=r", "r"), [x.to(gl.int32, bitcast=True)], gl.int32)


@gluon.jit
def multiply(query, keys, place, half: gl.constexpr):
    """The products [PART, HALF] of a part of the queries with half a block of keys."""
    keys = keys.index(place).slice(half * HALF, HALF, 0).permute((1, 0)).load(BYTES_RIGHT)
    return mma_v2(query.load(BYTES_LEFT), keys, gl.zeros([PART, HALF], gl.int32, SUMS))


@gluon.jit
def exponentials(logits, factor, maximum):
    """The probabilities of half a block, relative to a maximum."""
    return power(gl.fma(logits, factor, (OFFSET - maximum)[:, None]))


@gluon.jit
def weigh(p, values, place, half: gl.constexpr, start):
    """The sum of the values of half a block with the weights p, added to `start`."""
    p = gl.convert_layout(to_e4m3(p), BYTES_LEFT)
    values = values.index(place).slice(half * HALF, HALF, 1).permute((1, 0)).load(BYTES_RIGHT)
    return mma_v2(p, values, start)


@gluon.jit
def attend(query, keys, values, place, state, factor, repeats, FP8_IN_FULL: gl.constexpr):
    """Add a block of keys to the softmax of a part of the queries, whose maximum, total and output are `state`.

    `place` says where the block's keys and its values lie. The last key of the block is there `repeats` times more than it
    should be, with values of zero."""
    maximum, total, output = state
    first = multiply(query, keys, place[0], 0)
    second = multiply(query, keys, place[0], 1)
    first, second = first.to(gl.float32), second.to(gl.float32)
    higher = gl.maximum(maximum, gl.maximum(gl.max(first, 1), gl.max(second, 1)) * factor)
    shrink = power(maximum - higher)
    first, second = exponentials(first, factor, higher), exponentials(second, factor, higher)
    key = gl.arange(0, HALF, COLUMNS)[None, :]
    repeated = gl.where(key == HALF - 1, second * repeats, 0.0)
    total = gl.fma(total, shrink, gl.sum(first + second - repeated, 1))
    if FP8_IN_FULL:
        output = weigh(first, values, place[1], 0, output * shrink[:, None])
        output = weigh(second, values, place[1], 1, output)
    else:
        sums = weigh(first, values, place[1], 0, gl.zeros([PART, HEAD], gl.float32, SUMS))
        output = gl.fma(output, shrink[:, None], weigh(second, values, place[1], 1, sums))
    return higher, total, output


@gluon.jit
def begun():
    """The maximum, total and output of a part of the queries before its first block of keys."""
    maximum = gl.full([PART], -float("inf"), gl.float32, ROWS)
    total = gl.zeros([PART], gl.float32, ROWS)
    return maximum, total, gl.zeros([PART, HEAD], gl.float32, SUMS)


@gluon.jit
def queries_of(q, L, q_stride, first, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Some of the queries, from the row `first` on."""
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    lanes = gl.arange(0, HEAD, gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.load(q + (rows * q_stride + lanes), mask=rows < L - gl.program_id(0) * QUERIES, other=0.0)


@gluon.jit
def largest(x):
    """The largest magnitude of a part of the queries."""
    return gl.max(gl.abs(x).reshape((PART * HEAD,)), 0)


@gluon.jit
def features_of(query, key_mass):
    """The features of the linear branch of a part of the queries, divided by what they weigh."""
    feature = power(gl.fma(query, LOG2E, gl.max(query, 1, keep_dims=True) * -LOG2E))
    mass = gl.sum(feature * key_mass, 1, keep_dims=True)
    return feature * (1.0 / (mass + 1e-5 * gl.sum(feature, 1, keep_dims=True)))


@gluon.jit
def quantised_blocks(x):
    """A part of the output in a 16-bit type, in NVFP4: pairs of numbers and scales, as `block_quantiser.kernel` finds them. A
    thread has whole blocks."""
    x = gl.convert_layout(x, BYTES_LOADED).to(gl.float32).reshape((PART, HEAD // BLOCK, BLOCK))
    bits = gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 2, keep_dims=True)
    ratio = bits.to(gl.float32, bitcast=True) * (1.0 / (LARGEST * INPUT_SCALE))
    scale = to_e4m3(gl.where(ratio <= LEAST_RATIO, 1.0, ratio))
    numbers = gl.fma(x, reciprocal(scale.to(gl.float32) * INPUT_SCALE), SNAP) - SNAP
    low, high = gl.split(numbers.reshape((PART, HEAD // 2, 2)))
    pairs = gl.inline_asm_elementwise(
        TO_E2M1,
        "=r,f,f,f,f,f,f,f,f",
        [low, high],
        dtype=gl.uint8,
        is_pure=True,
        pack=4,
    )
    return gl.convert_layout(pairs, HALF_STORED), gl.convert_layout(scale.reshape((PART, HEAD // BLOCK)), SCALES_STORED)


@gluon.jit
def store(x, to, head, left, part, WIDTH: gl.constexpr, H: gl.constexpr, LAYOUT: gl.constexpr):
    """Store a part of the output, WIDTH values of a head in each row, of which there are `left` from the first part on."""
    rows = part * PART + gl.arange(0, PART, gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(to + head * WIDTH + (rows * (H * WIDTH) + column), x, mask=rows < left)


@gluon.jit
def attention(
    q, k, k_step, v, v_scale, selected, folded, folded_mass, bias, y, y_scale,
    L, q_stride, padded, M, N, num_selected,
    H: gl.constexpr,
    FP8_IN_FULL: gl.constexpr,
):  # fmt: skip
    """`sparse_linear_attention.kernel.attention` of 128 queries by 64 keys with `sage_fp8`. Without FP8_IN_FULL, the sum of
    each block is added outside of the tensor cores, which accumulate fp8 products with few bits."""
    block, head = gl.program_id(0), gl.program_id(1).to(gl.int64)
    dtype: gl.constexpr = q.dtype.element_ty
    k_step += head * N
    selected += (head * M + block) * num_selected
    last = num_selected - 1
    chosen = gl.load(selected)
    q += block.to(gl.int64) * QUERIES * q_stride + head * HEAD
    upper = queries_of(q, L, q_stride, 0, PART, BYTES_LOADED)
    lower = queries_of(q, L, q_stride, PART, PART, BYTES_LOADED)
    k += head * padded * HEAD
    v += head * padded * HEAD

    keys = gl.allocate_shared_memory(gl.int8, [2, KEYS, HEAD], BYTES_SHARED)
    values = gl.allocate_shared_memory(gl.float8e4nv, [2, HEAD, KEYS], VALUES_SHARED)
    queries = gl.allocate_shared_memory(gl.int8, [PARTS, PART, HEAD], BYTES_SHARED)
    copy(0, chosen, keys, values, k, v, padded, L)
    step = gl.load(k_step + chosen)
    ahead = gl.load(selected + gl.minimum(1, last))
    upper, lower = upper.to(gl.float32), lower.to(gl.float32)
    q_step = divided(gl.maximum(largest(upper), largest(lower)), 127.0) + 1e-7
    factor = divided(1.0, q_step) * 1.00000012
    queries.index(0).store(whole_steps(upper * factor))
    queries.index(1).store(whole_steps(lower * factor))
    scale = SOFTMAX_SCALE * q_step

    upper, lower = begun(), begun()
    for i in range(num_selected):
        async_copy.wait_group(0)
        gl.barrier()
        copy(i + 1 & 1, ahead, keys, values, k, v, padded, L)
        present, factor = i & 1, scale * step
        repeats = gl.maximum(chosen * KEYS + KEYS - L, 0).to(gl.float32)
        chosen, step = ahead, gl.load(k_step + ahead)
        ahead = gl.load(selected + gl.minimum(i + 2, last))
        place = present, present
        upper = attend(queries.index(0), keys, values, place, upper, factor, repeats, FP8_IN_FULL)
        place = present + zero_after(upper[1]), present + zero_after(lower[1])
        lower = attend(queries.index(1), keys, values, place, lower, factor, repeats, FP8_IN_FULL)
    async_copy.wait_group(0)

    # The linear branch is added to the sparse one and rounded once, where the reference rounds three times.
    gl.barrier()
    zero = zero_after(lower[1])
    L += zero
    q_stride += 16 * zero
    matrix = gl.allocate_shared_memory(dtype, [HEAD, HEAD], HALF_SHARED)
    features = gl.allocate_shared_memory(dtype, [PART, HEAD], HALF_SHARED)
    row = gl.arange(0, HEAD, gl.SliceLayout(1, HALF_LOADED))[:, None]
    lane = gl.arange(0, HEAD, gl.SliceLayout(0, HALF_LOADED))
    async_copy.async_load(matrix, folded + head * (HEAD * HEAD) + (row * HEAD + lane[None, :]))
    async_copy.commit_group()
    key_mass = gl.load(folded_mass + head * HEAD + lane)[None, :]
    column = gl.arange(0, HEAD, COLUMNS)
    channel_scale = gl.load(v_scale + head * HEAD + column)[None, :]
    offset = gl.load(bias + column).to(gl.float32)[None, :]
    upper = gl.fma(upper[2] * (1.0 / upper[1])[:, None], channel_scale, offset)
    lower = gl.fma(lower[2] * (1.0 / lower[1])[:, None], channel_scale, offset)
    results = ()
    for part in gl.static_range(PARTS):
        gl.barrier()
        for piece in gl.static_range(PART // PIECE):
            query = queries_of(q, L, q_stride, part * PART + piece * PIECE, PIECE, HALF_LOADED)
            feature = features_of(query.to(gl.float32), key_mass).to(dtype)
            features.slice(piece * PIECE, PIECE).store(feature)
        async_copy.wait_group(0)
        gl.barrier()
        output = mma_v2(features.load(HALF_LEFT), matrix.load(HALF_RIGHT), upper if part == 0 else lower)
        results = results + (rounded(output, dtype),)  # noqa: RUF005  Triton unpacks no tuple

    left = L - block * QUERIES
    if y.dtype.element_ty == gl.uint8:
        first = block.to(gl.int64) * QUERIES * H
        for part in gl.static_range(PARTS):
            pairs, scale = quantised_blocks(results[part].to(dtype))
            store(pairs, y + first * (HEAD // 2), head, left, part, HEAD // 2, H, HALF_STORED)
            store(scale, y_scale + first * (HEAD // BLOCK), head, left, part, HEAD // BLOCK, H, SCALES_STORED)
    else:
        if y_scale is not None:
            amax = gl.to_tensor(1e-8)
            for part in gl.static_range(PARTS):
                rows = part * PART + gl.arange(0, PART, ROWS)[:, None]
                amax = gl.maximum(amax, largest(gl.where(rows < left, results[part], 0.0)))
            gl.store(y_scale + block.to(gl.int64) * H + head, amax * (1.0 / 128.0))
            factor = divided(128.0, amax)
        stored: gl.constexpr = BYTES_LOADED if y_scale is not None else HALF_STORED
        y += block.to(gl.int64) * QUERIES * (H * HEAD) + head * HEAD
        for part in gl.static_range(PARTS):
            rows = part * PART + gl.arange(0, PART, gl.SliceLayout(1, stored))[:, None]
            place = y + (rows * (H * HEAD) + gl.arange(0, HEAD, gl.SliceLayout(0, stored))[None, :])
            if y_scale is not None:
                result = whole_steps(gl.minimum(results[part] * factor, 127.0))
            else:
                result = results[part].to(dtype)
            gl.store(place, gl.convert_layout(result, stored), mask=rows < left)
