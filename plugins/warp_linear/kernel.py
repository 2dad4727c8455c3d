"""The W8A8 linear of `w8a8_linear.kernel.gemm` in Gluon, for `mma.sync`. Letters as there.

A program has 128 rows and 128 outputs on four warps, each of which has 64x64 of them, so that two programs fit on an SM: one
multiplies while the other rescales, begins or ends. The sums of a thread take 128 registers, so a slab is multiplied in two
parts of 64 rows, whose integers take 64 more.

Shared memory of a program has room for one and a half slabs, in a ring of three places with 64 of the inputs. A slab takes
two of them. The first half of the next slab is copied into the third meanwhile, and its second half into the place of this
slab's first half, once both parts are done with it.

Products and rescaling are written in PTX, because the compiler would load more operands at a time than there are registers
for, and so is the copying, whose addresses it would keep.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from wanforge.plugins.w8a8_linear.kernel import GELU_CUBIC, GELU_LINEAR, pick
from wanforge.plugins.warp_moments.kernel import store_moments
from wanforge.plugins.warpgroup_attention.kernel import (
    PLAIN_SHARED,
    address,
    divided,
    power,
    reciprocal,
    rounded,
    whole_steps,
)

TILE = gl.constexpr(128)
PARTS = gl.constexpr(2)
PART = gl.constexpr(64)
"""Rows of a part of a tile."""
THREADS = gl.constexpr(128)
PLACES = gl.constexpr(3)
PLACE = gl.constexpr(16384)
"""Bytes of a place in the ring: half a slab of x, then one of a weight."""
ROUND_BITS = gl.constexpr("0x4B400000")
"""The bits of `quantiser.kernel.ROUND`, at which sums start; see `w8a8_linear.kernel.dot`."""

SUMS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [2, 2], [16, 8]))
COLUMNS = gl.constexpr(gl.SliceLayout(0, SUMS))
HALF_STORED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
BYTES_STORED = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
EACH = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.constexpr_function
def copies(K):
    """PTX of a thread's copies of half a slab as a group, which is empty if it is not wanted: pieces of 16 bytes of four rows
    of a weight and of four of x. Their addresses are worked out each time, because there are no registers to keep them."""
    lines = ["{", ".reg .pred wanted;", ".reg .b32 column, row, offset;", ".reg .b64 far, place;"]
    lines += ["setp.ne.b32 wanted, $2, 0;", "mad.lo.s32 column, $1, 64, $6;"]
    lines += [f"mad.lo.s32 offset, $5, {K}, column;", "cvt.s64.s32 far, offset;", "add.s64 place, $4, far;"]
    for i in range(4):
        lines += [f"@wanted cp.async.cg.shared.global [$0 + {8192 + 2048 * i}], [place + {32 * K * i}], 16;"]
    for i in range(4):
        # A ragged tile reads its last row again: values outside are never stored, and change no largest magnitude.
        lines += [
            f"add.s32 row, $5, {32 * i};",
            "min.s32 row, row, $7;",
            f"mad.lo.s32 offset, row, {K}, column;",
            "cvt.s64.s32 far, offset;",
            "add.s64 place, $3, far;",
            f"@wanted cp.async.cg.shared.global [$0 + {2048 * i}], [place], 16;",
        ]
    return "\n".join([*lines, "cp.async.commit_group;", "}"])


@gluon.jit
def copy(to, half, is_wanted, origin, K: gl.constexpr):
    """Begin a thread's copies of half a slab, if it is wanted. `to` is the address of its first piece; `origin` is where x and
    a weight begin, the thread's first row and column, and the last row that there is."""
    x, w, row, column, last = origin
    gl.inline_asm(copies(K), "r,r,r,l,l,r,r,r", [to, half, is_wanted.to(gl.int32), x, w, row, column, last])


@gluon.jit
def wait_for_all_but_one():
    """Wait until only the latest group of copies is on its way, and for the other threads."""
    gl.inline_asm("cp.async.wait_group 1;")
    gl.barrier()


@gluon.constexpr_function
def products(integers, starts, place):
    """PTX that multiplies half a slab of a part's rows: 2 by 8 tiles of 16x8, by 64 inputs. `place` are the addresses of
    its operands; without `starts`, sums start at ROUND_BITS.

    The operands of 32 inputs are loaded once the last product of those before is done, or they would take registers from
    the sums. No sum is negative, so its sign, which is added to addresses, is zero.
    """
    operands = ", ".join([f"a{i}" for i in range(8)] + [f"b{i}" for i in range(16)])
    lines = [f".reg .b32 {operands}, from_a, from_b, zero, start;", f"mov.b32 start, {ROUND_BITS.value};"]
    load, multiply = "ldmatrix.sync.aligned.m8n8.x4.shared.b16", "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
    for step in range(2):
        before = integers if step else starts
        # Pieces of 16 bytes are swizzled, and two of them are multiplied at a time.
        lines += [f"xor.b32 from_a, {place[0]}, {32 * step};", f"xor.b32 from_b, {place[1]}, {32 * step};"]
        if before:
            lines += [f"shr.u32 zero, {before[-4]}, 31;"]
            lines += ["xor.b32 from_a, from_a, zero;", "xor.b32 from_b, from_b, zero;"]
        for name, count in (("a", 2), ("b", 4)):
            for i in range(count):
                four = ", ".join(f"{name}{4 * i + n}" for n in range(4))
                lines += [f"{load} {{{four}}}, [from_{name} + {2048 * i}];"]
        for j in range(8):
            for i in range(2):
                tile = slice(4 * (8 * i + j), 4 * (8 * i + j) + 4)
                left = ", ".join(f"a{4 * i + n}" for n in range(4))
                given = ", ".join(before[tile] if before else ["start"] * 4)
                lines += [
                    f"{multiply} {{{', '.join(integers[tile])}}}, {{{left}}}, {{b{2 * j}, b{2 * j + 1}}}, {{{given}}};"
                ]
    return lines


@gluon.constexpr_function
def first_half(outputs, inputs):
    """PTX of the products of a slab's first half."""
    return "\n".join(["{", *products(outputs[0], (), [each[0] for each in inputs]), "}"])


@gluon.constexpr_function
def second_half(outputs, inputs):
    """PTX that adds the products of a slab's second half, and adds the integers, times a factor, to sums. Its second result
    is the zero of `products` for the part that follows."""
    starts, _, (factor,), *place = inputs
    integers = tuple(f"integer{i}" for i in range(len(starts)))
    lines = [f".reg .b32 {', '.join(integers)};", *products(integers, starts, [each[0] for each in place])]
    lines += [f"shr.u32 {outputs[1][0]}, {integers[-4]}, 31;"]
    for total, integer in zip(outputs[0], integers, strict=True):
        lines += [f"sub.rn.f32 {integer}, {integer}, 0f4B400000;"]
        lines += [f"fma.rn.f32 {total}, {integer}, {factor}, {total};"]
    return "\n".join(["{", *lines, "}"])


BEGUN = gl.constexpr(",".join(["=&r"] * 64 + ["r", "r"]))
ENDED = gl.constexpr(",".join(["=&f"] * 64 + ["=&r"] + ["r"] * 64 + [str(i) for i in range(64)] + ["f", "r", "r"]))


@gluon.jit
def begin(from_x, from_w):
    """The integers of a part of a tile by half a slab, whose operands begin at these addresses for a thread."""
    TYPE: gl.constexpr = gl.distributed_type(gl.int32, [PART, TILE], SUMS)
    return gl.inline_asm(first_half, BEGUN, [from_x, from_w], TYPE)


@gluon.jit
def end(integers, sums, factor, from_x, from_w):
    """The sums of a part with the products of a slab, which its second half completes, and a zero that is known once they
    are. Added to the addresses of the next part, it keeps the operands of that from being loaded earlier."""
    return gl.inline_asm(second_half, ENDED, [integers, sums, factor, from_x, from_w], (sums.type, gl.int32))


@gluon.jit
def factor_at(place):
    """The float32 at an address of shared memory."""
    return gl.inline_asm("ld.shared.f32 $0, [$1];", "=f,r", [place], gl.float32)


@gluon.jit
def place_of(M, N: gl.constexpr, GROUP: gl.constexpr):
    """`w8a8_linear.kernel.place_of`: the row and the column of a program's tile."""
    columns: gl.constexpr = N // TILE
    tile, row_tiles = gl.program_id(0), gl.cdiv(M, TILE)
    first_row = tile // (GROUP * columns) * GROUP
    group = gl.minimum(row_tiles - first_row, GROUP)
    return first_row + tile % (GROUP * columns) % group, tile % (GROUP * columns) // group


@gluon.jit
def gelu(x):
    """`w8a8_linear.kernel.gelu`."""
    exponent = x * gl.fma(x * x, -GELU_CUBIC, -GELU_LINEAR)
    return x * reciprocal(1.0 + power(gl.minimum(exponent, 115.0)))


@gluon.jit
def epilogue(total, bias, gate, compute: gl.constexpr, GELU: gl.constexpr):
    """Apply bias, GELU and gate to a part of a product; bias and gate are in shared memory."""
    total = rounded(rounded(total, compute) + bias.load(COLUMNS).to(gl.float32)[None, :], compute)
    if GELU:
        total = rounded(gelu(total), compute)
    if gate is not None:
        total = rounded(total * gate.load(COLUMNS).to(gl.float32)[None, :], compute)
    return total


@gluon.jit
def gemm(
    x, x_scale,
    weight_0, weight_1, weight_2,
    scale_0, scale_1, scale_2,
    bias_0, bias_1, bias_2,
    y_0, y_1, y_2,
    y_scale, residual, gate, moments,
    M,
    N: gl.constexpr,
    K: gl.constexpr,
    GELU: gl.constexpr,
    WEIGHTS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """`w8a8_linear.kernel.gemm` of at most 16,384 inputs, with biases of 16 bits."""
    SLABS: gl.constexpr = K // TILE
    which = gl.program_id(1)
    row_tile, column_tile = place_of(M, N, GROUP)
    weight, scale = pick(which, weight_0, weight_1, weight_2, WEIGHTS), pick(which, scale_0, scale_1, scale_2, WEIGHTS)
    bias, y = pick(which, bias_0, bias_1, bias_2, WEIGHTS), pick(which, y_0, y_1, y_2, WEIGHTS)
    compute: gl.constexpr = bias.dtype.element_ty

    # Loads return in order, so all that is small is asked for ahead of the slabs.
    thread = gl.arange(0, THREADS, EACH)
    k = gl.minimum(thread, SLABS - 1)
    factor = gl.load(x_scale + row_tile.to(gl.int64) * SLABS + k)
    factor *= gl.load(scale + column_tile.to(gl.int64) * SLABS + k)
    offset = gl.load(bias + column_tile * TILE + thread)
    if gate is not None:
        share = gl.load(gate + column_tile * TILE + thread)

    ring = gl.allocate_shared_memory(gl.int8, [PLACES, PLACE], PLAIN_SHARED)
    row, piece = thread // 4, thread % 4
    x += (row_tile * TILE).to(gl.int64) * K
    weight += (column_tile * TILE).to(gl.int64) * K
    origin = (x, weight, row, piece * 16, M - 1 - row_tile * TILE)
    to = row * 64 + (piece ^ row // 2 % 4) * 16
    lane, warp = thread % 32, thread // 32
    left = warp // 2 * 16 + lane % 16
    right = warp % 2 * 8 + lane // 16 * 16 + lane % 8
    left = left * 64 + (lane // 16 ^ left // 2 % 4) * 16
    right = right * 64 + (lane // 8 % 2 ^ right // 2 % 4) * 16 + PLACE // 2
    first = address(ring)
    second, third = first + PLACE, first + 2 * PLACE
    copy(first + to, 0, gl.to_tensor(True), origin, K)
    copy(second + to, 1, gl.to_tensor(True), origin, K)
    factors = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, factor)
    factor = address(factors)
    offsets = gl.allocate_shared_memory(compute, [TILE], PLAIN_SHARED, offset)
    shares = None
    if gate is not None:
        shares = gl.allocate_shared_memory(compute, [TILE], PLAIN_SHARED, share.to(compute))

    upper = gl.zeros([PART, TILE], gl.float32, SUMS)
    lower = gl.zeros([PART, TILE], gl.float32, SUMS)
    for i in range(SLABS):
        # Here nobody reads the third place any more.
        wait_for_all_but_one()
        step = factor_at(factor + 4 * i)
        copy(third + to, 2 * i + 2, i + 1 < SLABS, origin, K)
        integers = begin(first + left, first + right)
        wait_for_all_but_one()
        upper, zero = end(integers, upper, step, second + left, second + right)
        integers = begin(first + left + 4096 + zero, first + right + zero)
        gl.barrier()
        copy(first + to, 2 * i + 3, i + 1 < SLABS, origin, K)
        lower, _ = end(integers, lower, step, second + left + 4096, second + right)
        first, second, third = third, first, second
    gl.barrier()
    ring._keep_alive()
    factors._keep_alive()

    stored: gl.constexpr = BYTES_STORED if y_scale is not None else HALF_STORED
    row = gl.arange(0, PART, gl.SliceLayout(1, stored))[:, None]
    start = (row_tile * TILE).to(gl.int64) * N + column_tile * TILE
    place = row * N + gl.arange(0, TILE, gl.SliceLayout(0, stored))[None, :]
    left_over = M - row_tile * TILE
    if residual is not None:
        before = ()
        for part in gl.static_range(PARTS):
            places = residual + start + part * (PART * N) + place
            before += (gl.load(places, mask=row < left_over - part * PART, other=0.0),)
    upper = epilogue(upper, offsets, shares, compute, GELU)
    lower = epilogue(lower, offsets, shares, compute, GELU)
    if moments is not None:
        column = gl.inline_asm("shr.u32 $0, $1, 7;", "=r,r", [column_tile * TILE], gl.int32)
    if y_scale is not None:
        largest = gl.maximum(gl.abs(upper), gl.abs(lower))
        amax = gl.maximum(gl.max(largest.reshape((PART * TILE,)), 0), 1e-8)
        gl.store(y_scale + row_tile.to(gl.int64) * (N // TILE) + column_tile, amax * (1.0 / 128.0))
        factor = divided(128.0, amax)
    for part in gl.static_range(PARTS):
        total = upper if part == 0 else lower
        inside = row < left_over - part * PART
        places = y + start + part * (PART * N) + place
        if y_scale is not None:
            steps = whole_steps(gl.minimum(total * factor, 127.0))
            gl.store(places, gl.convert_layout(steps, stored), mask=inside)
        else:
            total = gl.convert_layout(total.to(compute), stored)
            if residual is not None:
                total = total.to(gl.float32) + before[part].to(gl.float32)
            total = total.to(y.dtype.element_ty)
            gl.store(places, total, mask=inside)
            if moments is not None:
                store_moments(total.to(gl.float32), moments, row_tile * TILE + part * PART, column, M, N)
