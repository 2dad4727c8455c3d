"""The W8A8 linear of `w8a8_linear.kernel.gemm` in Gluon, for `wgmma` of sm_90. Letters as there.

A program computes one tile of 128 rows and 256 outputs after the other, which reads three quarters of what tiles of 128x128
read from the L2 cache. Each of its two warpgroups has 128 outputs, and multiplies a slab in two parts of 64 rows, because the
sums of both and the integers of one fill its registers. It rescales one part while the other warpgroup multiplies, so no
barrier may hold both, and none is in the loop:

- One thread begins the bulk copies of slab i + 2 in iteration i, and their bytes arrive at the mbarrier of the slab's slot.
- Every thread arrives there as well, at the end of iteration i.
- A thread waits at the mbarrier of slab i + 1 at the end of iteration i. Every other thread then has ended iteration i - 1, so
  nobody reads slab i - 1 any more, and its slot takes slab i + 3: there are four slots. It is copied one product later, or at
  once where a tile ends.

Slabs are counted through all tiles, so those of the next tile arrive while this one ends. So do its steps, biases and gates,
which each thread copies a word of, and whose arrival is the thread's own. The outputs of a warpgroup have scales of
their own, so the warpgroups need not meet at the end of a tile either, and one may begin the next tile while the other ends
this one.

Copies, waits and the rescaling are written in PTX: copies and waits for the reason that `warpgroup_attention.kernel` gives, the
rescaling because the compiler would put it after the next product, for which there are no registers. Only the first warp comes to
the bulk copies, since their addresses are work for all that do.

Bias, gate and residual are added to pairs of 16-bit numbers, which rounds as the reference does. The rows of a weight lie in
shared memory in such an order that a thread's sums are those of 8 outputs side by side, so it stores what it has.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from wanforge.plugins.w8a8_linear.kernel import pick
from wanforge.plugins.warpgroup_attention.kernel import (
    BYTES_SHARED,
    PLAIN_SHARED,
    address,
    bulk_copy,
    divided,
    multiply,
    registers,
    wait,
    warp_number,
    widening,
)

TILE = gl.constexpr(128)
PARTS, ROWS = gl.constexpr(2), gl.constexpr(64)
"""The parts of a tile that are multiplied one after the other, and their rows."""
GROUPS, WIDTH = gl.constexpr(2), gl.constexpr(256)
"""The warpgroups, and the outputs of both."""
AHEAD, SLOTS = gl.constexpr(2), gl.constexpr(4)
SETS = gl.constexpr(4)
"""Tiles whose vectors shared memory holds: one warpgroup may still read those of the tile before, and the next ones arrive."""
THREADS = gl.constexpr(256)
VALUES = gl.constexpr(64)
"""The sums of a thread in one part of a tile."""

CUBIC, LINEAR = gl.constexpr("0fBDD2D3E8"), gl.constexpr("0fC0135761")
"""`w8a8_linear.kernel.GELU_CUBIC` and `GELU_LINEAR` with the other sign, as PTX writes them."""

SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 128, 32]))
COLUMNS = gl.constexpr(gl.SliceLayout(0, SUMS))
STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [0, 128]],
        [],
        [64, 256],
    )
)
"""How the sums of a part lie in registers, by rows and outputs; see `column_of`."""
EACH = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))


@gluon.constexpr_function
def maps(weights):
    """The tensor maps of x and of the weights, which are the first parameters of `gemm`, as PTX names them. Each is followed
    by the sizes and the strides of its view, of two and of five dimensions."""
    return [f"gemm_param_{i}" for i in (0, 5, 16, 27)[: 1 + weights]]


@gluon.constexpr_function
def copies(weights):
    """PTX of the thread that copies a slab, which is elected of the first warp."""
    x, first, *others = maps(weights)
    choices = [
        f"cvta.param.u64 other, {name}; setp.eq.s32 this, $8, {i}; selp.b64 weight, other, weight, this;"
        for i, name in enumerate(others, 1)
    ]
    lines = [
        "{",
        ".reg .pred wanted, first, elected, this;",
        ".reg .b32 barrier, to_x, to_weight, lane;",
        ".reg .b64 x, weight, other;",
        "setp.ne.b32 wanted, $2, 0;",
        "setp.eq.u32 first, $6, 0;",
        "and.pred wanted, wanted, first;",
        "@!wanted bra.uni copied;",
        "elect.sync lane|elected, -1;",
        "mad.lo.s32 to_x, $0, 16384, $3;",
        "mad.lo.s32 to_weight, $0, 32768, $4;",
        "mad.lo.s32 barrier, $0, 8, $5;",
        f"cvta.param.u64 x, {x};",
        f"cvta.param.u64 weight, {first};",
        *choices,
        "@elected mbarrier.arrive.expect_tx.shared::cta.b64 _, [barrier], 49152;",
        bulk_copy(5, "to_weight", "weight, {$1, 0, 0, 0, $9}"),
        bulk_copy(2, "to_x", "x, {$1, $7}"),
        "copied:",
        "}",
    ]
    return "\n".join(lines)


@gluon.jit
def copy(slot, k, is_wanted, to, place, WEIGHTS: gl.constexpr):
    """Copy a slab of a tile that begins at column k of x, if it is wanted, and let its bytes arrive at the mbarrier of its slot.
    `to` are the addresses of the slabs of x, of those of the weights and of the first mbarrier, and the warp's number."""
    which, row_tile, columns = place
    gl.inline_asm(
        copies(WEIGHTS),
        "r,r,r,r,r,r,r,r,r,r",
        [slot, k, is_wanted.to(gl.int32), to[0], to[1], to[2], to[3], row_tile * TILE, which, columns * (WIDTH // 32)],
    )


@gluon.jit
def arrive(barrier):
    """Let every thread arrive at the mbarrier at an address, once what it has copied itself is there."""
    gl.inline_asm("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", "r", [barrier])


@gluon.jit
def wait_if(wanted, barrier, phase):
    """Wait until a phase of the mbarrier at an address is complete, if that is wanted."""
    gl.inline_asm(
        """{
        .reg .pred complete, wanted;
        setp.ne.b32 wanted, $2, 0;
        setp.eq.b32 complete, $2, 0;
        waiting:
        @wanted mbarrier.try_wait.parity.shared.b64 complete, [$0], $1;
        @!complete bra.uni waiting;
        }""",
        "r,r,r",
        [barrier, phase, wanted.to(gl.int32)],
    )


@gluon.constexpr_function
def rescaling(outputs, inputs):
    """PTX that waits for products and adds them, times both of their steps, to sums."""
    products, _, (x,), (weight,) = inputs
    lines = [
        "{",
        ".reg .b32 product, factor;",
        "wgmma.wait_group.sync.aligned 0;",
        f"mul.rn.f32 factor, {x}, {weight};",
    ]
    for total, product in zip(outputs[0], products, strict=True):
        lines += [f"cvt.rn.f32.s32 product, {product};", f"fma.rn.f32 {total}, product, factor, {total};"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def tied(count):
    """Constraints of sums, products, the sums that they are added to, and two steps."""
    return ",".join(["=f"] * count + ["r"] * count + [str(i) for i in range(count)] + ["f", "f"])


@gluon.jit
def rescale(products, steps, sums):
    """Add products, once they are complete, times both of their steps to sums."""
    return gl.inline_asm(rescaling, tied(VALUES), [registers(products), sums, steps[0], steps[1]], sums.type)


@gluon.jit
def multiply_again(a, b, products, never):
    """A product that begins in the registers of another, which are no longer needed. `never` is false, which the compiler
    does not know: if it did, it would take other registers, and use up those of the sums."""
    return warpgroup_mma(a, b.permute((1, 0)), registers(products), use_acc=never, is_async=True)


@gluon.jit
def steps_at(place):
    """A step of x and one of a weight, side by side at an address of shared memory."""
    return gl.inline_asm("ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [place], (gl.float32, gl.float32))


@gluon.jit
def copy_word(to, origin, wanted):
    """Begin the copy of four bytes in each thread that wants it."""
    gl.inline_asm(
        """{
        .reg .pred wanted;
        setp.ne.b32 wanted, $2, 0;
        @wanted cp.async.ca.shared.global [$0], [$1], 4;
        }""",
        "r,l,r",
        [to, origin, wanted.to(gl.int32)],
    )


@gluon.jit
def copy_vectors(tile_set, to, place, vectors, is_wanted, SLABS: gl.constexpr, WEIGHTS: gl.constexpr):
    """Begin the copies of what a tile needs besides its slabs, if it is wanted. `to` are the addresses of the steps, biases
    and gates in shared memory."""
    which, row_tile, columns = place
    x_scale, scales, biases, gate = vectors
    scale = pick(which, scales[0], scales[1], scales[2], WEIGHTS) + columns.to(gl.int64) * (GROUPS * SLABS)
    bias = pick(which, biases[0], biases[1], biases[2], WEIGHTS) + columns * WIDTH
    thread = gl.arange(0, THREADS, EACH)
    group, k = thread // TILE, gl.minimum(thread % TILE, SLABS - 1)
    is_slab = is_wanted & (thread % TILE < SLABS)
    step = to[0] + tile_set * (16 * triton.next_power_of_2(SLABS)) + 16 * k + 8 * group
    copy_word(step, x_scale + row_tile.to(gl.int64) * SLABS + k, is_slab)
    copy_word(step + 4, scale + (group * SLABS + k), is_slab)
    pair = thread % (WIDTH // 2)
    copy_word(to[1] + tile_set * (2 * WIDTH) + 4 * pair, bias + column_of(2 * pair), is_wanted & (thread == pair))
    if gate is not None:
        share = gate + columns * WIDTH + column_of(thread)
        copy_word(to[2] + tile_set * (4 * WIDTH) + 4 * thread, share, is_wanted & (thread >= 0))


@gluon.constexpr_function
def name_of(dtype):
    """How PTX names pairs of numbers of 16 bits."""
    return "bf16x2" if dtype == gl.bfloat16 else "f16x2"


@gluon.jit
def wide(x):
    """Numbers of 16 bits as float32."""
    PTX: gl.constexpr = widening(x.dtype, "$2", "$0", "$1")
    return gl.inline_asm_elementwise(PTX, "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def of_two(NAME: gl.constexpr, x, y):
    """What an instruction of PTX makes of two numbers of 16 bits."""
    PTX: gl.constexpr = NAME + "." + name_of(x.dtype) + " $0, $1, $2;"
    return gl.inline_asm_elementwise(PTX, "=r,r,r", [x, y], dtype=x.dtype, is_pure=True, pack=2)


@gluon.constexpr_function
def gelu_of_two(dtype):
    """PTX of `w8a8_linear.kernel.gelu` of two numbers, which share a reciprocal. What is below -7.5 becomes that, whose GELU
    is -4e-18, because the product of larger divisors has no reciprocal."""
    least = "0xc0f0c0f0" if dtype == gl.bfloat16 else "0xc780c780"
    lines = [
        "{",
        ".reg .b32 both, x0, x1, e0, e1, r;",
        f"mov.b32 both, {least};",
        f"max.{name_of(dtype)} both, $1, both;",
    ]
    lines += [widening(dtype, "both", "x0", "x1")]
    for x, e in (("x0", "e0"), ("x1", "e1")):
        lines += [
            f"mul.rn.f32 {e}, {x}, {x};",
            f"fma.rn.f32 {e}, {e}, {CUBIC.value}, {LINEAR.value};",
            f"mul.rn.f32 {e}, {e}, {x};",
            f"ex2.approx.ftz.f32 {e}, {e};",
        ]
    lines += [
        "add.rn.f32 r, e0, 0f3F800000;",
        "fma.rn.f32 r, r, e1, r;",
        "rcp.approx.ftz.f32 r, r;",
        "fma.rn.f32 x0, x0, e1, x0;",
        "fma.rn.f32 x1, x1, e0, x1;",
        "mul.rn.f32 x0, x0, r;",
        "mul.rn.f32 x1, x1, r;",
        f"cvt.rn.{name_of(dtype)}.f32 $0, x1, x0;",
    ]
    return "\n".join([*lines, "}"])


@gluon.jit
def gelu_of(x):
    """`w8a8_linear.kernel.gelu` of numbers of 16 bits, rounded to them."""
    return gl.inline_asm_elementwise(gelu_of_two(x.dtype), "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


@gluon.constexpr_function
def steps_of_four(dtype):
    """PTX of `quantiser.kernel.tile_steps` of four numbers, given how many steps one has. Of 128 steps, 127 are left once
    they are integers, two at a time."""
    lines = ["{", ".reg .b32 x0, x1, x2, x3, low, high, most;", "mov.b32 most, 0x007f007f;"]
    lines += [widening(dtype, "$1", "x0", "x1"), widening(dtype, "$2", "x2", "x3")]
    for x in ("x0", "x1", "x2", "x3"):
        lines += [f"mul.rn.f32 {x}, {x}, $3;", f"add.rn.f32 {x}, {x}, 0f4B400000;"]
    for pair, x, y in (("low", "x0", "x1"), ("high", "x2", "x3")):
        lines += [f"prmt.b32 {pair}, {x}, {y}, 0x5410;", f"min.s16x2 {pair}, {pair}, most;"]
    return "\n".join([*lines, "prmt.b32 $0, low, high, 0x6420;", "}"])


@gluon.jit
def by_group(x):
    """A part of a tile as [ROWS, GROUPS, TILE], of which each warpgroup has its own outputs."""
    return x.reshape((ROWS, GROUPS, TILE))


@gluon.jit
def steps_of(x, factor):
    """Numbers of 16 bits, times a factor of each warpgroup, as whole steps."""
    PTX: gl.constexpr = steps_of_four(x.dtype)
    x = by_group(x)
    layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, x.type.layout))
    factor = gl.convert_layout(factor, layout, assert_trivial=True)[None, :, None]
    x = gl.inline_asm_elementwise(PTX, "=r,r,r,f,f,f,f", [x, factor], dtype=gl.int8, is_pure=True, pack=4)
    return gl.convert_layout(x.reshape((ROWS, WIDTH)), STORED, assert_trivial=True)


@gluon.jit
def halves(x):
    """The left and the right half of the outputs of each warpgroup."""
    return x.reshape((ROWS, GROUPS, 2, x.shape[2] // 2)).permute((0, 1, 3, 2)).split()


@gluon.jit
def largest(x, rows):
    """The largest magnitudes of so many rows of a part, among some of each warpgroup's outputs."""
    x = by_group(x)
    for _ in gl.static_range(4):
        left, right = halves(x)
        x = of_two("max.xorsign.abs", left, right)  # which come with any sign until the end
    inside = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, x.type.layout)))[:, None, None] < rows
    return gl.where(inside, gl.abs(x.to(gl.float32)), 0.0)


@gluon.constexpr_function
def largest_of_group(outputs, inputs):
    """PTX of the largest of what all threads of a warpgroup have, which meet at a barrier of their own."""
    values, (scratch,), (warp,) = inputs
    lines = [
        "{",
        ".reg .pred first;",
        ".reg .b32 most, other, place, group, b, c, d;",
        f"mov.b32 most, {values[0]};",
        *(f"max.f32 most, most, {each};" for each in values[1:]),
    ]
    for distance in (16, 8, 4, 2, 1):
        lines += [f"shfl.sync.bfly.b32 other, most, {distance}, 31, -1;", "max.f32 most, most, other;"]
    lines += [
        "mov.u32 other, %tid.x;",
        "and.b32 other, other, 31;",
        "setp.eq.u32 first, other, 0;",
        f"mad.lo.s32 place, {warp}, 4, {scratch};",
        "@first st.shared.b32 [place], most;",
        f"shr.u32 group, {warp}, 2;",
        f"mad.lo.s32 place, group, 16, {scratch};",
        "add.s32 group, group, 1;",
        "bar.sync group, 128;",
        "ld.shared.v4.b32 {most, b, c, d}, [place];",
        "max.f32 most, most, b;",
        "max.f32 c, c, d;",
        f"max.f32 {outputs[0][0]}, most, c;",
    ]
    return "\n".join([*lines, "}"])


@gluon.jit
def largest_of_groups(x, scratch, warp):
    """The largest of the values of each warpgroup, given the address of 32 bytes that nobody uses."""
    groups = gl.arange(0, GROUPS, gl.SliceLayout(0, gl.SliceLayout(2, x.type.layout))).to(gl.float32)
    return gl.inline_asm(largest_of_group, "=f,f,f,f,f,r,r", [x, scratch, warp], groups.type)


@gluon.jit
def place_of(tile, M, N: gl.constexpr, GROUP: gl.constexpr, WEIGHTS: gl.constexpr):
    """`w8a8_linear.kernel.place_of` of a tile of any weight: which weight, the row of the tile, and which 256 columns it has."""
    columns: gl.constexpr = N // WIDTH
    row_tiles = gl.cdiv(M, TILE)
    which = gl.to_tensor(0)
    if WEIGHTS > 1:
        which, tile = tile // (row_tiles * columns), tile % (row_tiles * columns)
    first_row = tile // (GROUP * columns) * GROUP
    group = gl.minimum(row_tiles - first_row, GROUP)
    return which, first_row + tile % (GROUP * columns) % group, tile % (GROUP * columns) // group


@gluon.jit
def either(is_first, first, second):
    """One of two places."""
    return (
        gl.where(is_first, first[0], second[0]),
        gl.where(is_first, first[1], second[1]),
        gl.where(is_first, first[2], second[2]),
    )


@gluon.jit
def column_of(n):
    """Which output is column n of the products. Of every 32 columns, a thread has the sums of two in each 8; these are four
    pairs of 8 outputs that lie side by side."""
    return n & -31 | (n & 6) << 2 | n >> 2 & 6


@gluon.jit
def in_order(x):
    """What was made of the sums of a part, by outputs in place of columns. It stays in its registers."""
    x = x.reshape((ROWS, 8, 4, 4, 2)).permute((0, 1, 3, 2, 4)).reshape((ROWS, WIDTH))
    return gl.convert_layout(x, STORED, assert_trivial=True)


@gluon.jit
def store_moments(x, moments, row, column, M, N: gl.constexpr):
    """`row_moments.kernel.store_moments` of a part in 16-bit numbers, which begins at a row, and in column `column` of tiles."""
    left, right = halves(by_group(wide(x)))
    mean = gl.sum(left + right, 2) * (1.0 / TILE)
    left, right = left - mean[:, :, None], right - mean[:, :, None]
    square = gl.sum(gl.fma(left, left, right * right), 2)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, mean.type.layout))[:, None]
    columns = gl.arange(0, GROUPS, gl.SliceLayout(0, mean.type.layout))[None, :]
    place = moments + (column * M + row) + (columns * M + rows)
    gl.store(place, mean, mask=rows < M - row)
    gl.store(place + N // TILE * M, square, mask=rows < M - row)


@gluon.jit
def epilogue(total, bias, gate, GELU: gl.constexpr):
    """Apply bias, GELU and gate, which are in shared memory, to the sums of a tile, and round after each."""
    total = of_two("add.rn", total.to(bias.dtype), bias.load(COLUMNS)[None, :])
    if GELU:
        total = gelu_of(total)
    if gate is not None:
        total = of_two("mul.rn", total, gate.load(COLUMNS).to(bias.dtype)[None, :])
    return total


@gluon.jit
def finish(sums, offsets, shares, scratch, place, y, after, M, N: gl.constexpr, GELU: gl.constexpr):
    """Apply what follows the sums of a tile, and store the outputs. `scratch` are an address in shared memory, and the warp's
    number."""
    y_scale, residual, gate, moments = after
    row_tile, columns = place[1], place[2]
    first = (row_tile * TILE).to(gl.int64) * N + columns * WIDTH
    rows, left = gl.arange(0, ROWS, gl.SliceLayout(1, STORED))[:, None], M - row_tile * TILE
    where = rows * N + gl.arange(0, WIDTH, gl.SliceLayout(0, STORED))[None, :]
    before, totals = (), ()
    if residual is not None:
        for part in gl.static_range(PARTS):
            begin = residual + first + part * ROWS * N
            before += (gl.load(begin + where, mask=rows < left - part * ROWS, other=0.0),)
    for part in gl.static_range(PARTS):
        totals += (epilogue(sums[part], offsets, None if gate is None else shares, GELU),)
    if y_scale is not None:
        most = gl.maximum(largest(totals[1], left - ROWS), largest(totals[0], left))
        amax = gl.maximum(largest_of_groups(most, scratch[0], scratch[1]), 1e-8)
        y_scale += row_tile.to(gl.int64) * (N // TILE) + columns * GROUPS
        gl.store(y_scale + gl.arange(0, GROUPS, amax.type.layout), amax * (1.0 / 128.0))
        factor = divided(128.0, amax)
    for part in gl.static_range(PARTS):
        total = in_order(totals[part])
        if y_scale is not None:
            total = steps_of(total, factor)
        else:
            if residual is not None:
                total = of_two("add.rn", total, before[part])
        gl.store(y + first + part * ROWS * N + where, total, mask=rows < left - part * ROWS)
        if moments is not None:
            store_moments(total, moments, row_tile * TILE + part * ROWS, columns * GROUPS, M, N)


@gluon.jit
def gemm(
    x, weight_0, weight_1, weight_2,
    x_scale,
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
    PROGRAMS: gl.constexpr,
):  # fmt: skip
    """`w8a8_linear.kernel.gemm` of multiples of 256 outputs, with biases of 16 bits."""
    SLABS: gl.constexpr = K // TILE
    ROOM: gl.constexpr = 4 * triton.next_power_of_2(SLABS)
    compute: gl.constexpr = bias_0.dtype.element_ty
    xs = gl.allocate_shared_memory(gl.int8, [SLOTS, TILE, TILE], BYTES_SHARED)
    ws = gl.allocate_shared_memory(gl.int8, [SLOTS, WIDTH, TILE], BYTES_SHARED)
    barriers = mbarrier.allocate_mbarrier(batch=SLOTS)
    steps = gl.allocate_shared_memory(gl.float32, [SETS, ROOM], PLAIN_SHARED)
    offsets = gl.allocate_shared_memory(compute, [SETS, WIDTH], PLAIN_SHARED)
    scratch = gl.allocate_shared_memory(gl.float32, [SETS, 8], PLAIN_SHARED)
    shares = gl.allocate_shared_memory(gl.float32, [SETS, WIDTH if gate is not None else 1], PLAIN_SHARED)
    for each in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(each), count=THREADS + 1)
    fence_async_shared()
    gl.barrier()
    warp = warp_number()
    to, vectors_to = (
        (address(xs), address(ws), address(barriers), warp),
        (address(steps), address(offsets), address(shares)),
    )
    vectors = (x_scale, (scale_0, scale_1, scale_2), (bias_0, bias_1, bias_2), gate)

    tiles = gl.cdiv(M, TILE) * (N // WIDTH) * WEIGHTS
    tile = gl.program_id(0)
    place = place_of(tile, M, N, GROUP, WEIGHTS)
    copy_vectors(0, vectors_to, place, vectors, tile < tiles, SLABS, WEIGHTS)
    for each in gl.static_range(AHEAD + 1):
        copy(each, each * TILE, tile < tiles, to, place, WEIGHTS)
    for each in gl.static_range(AHEAD):
        arrive(to[2] + 8 * each)
    whole = gl.zeros([ROWS, WIDTH], gl.int32, SUMS)
    slab, tile_set = gl.to_tensor(0), gl.to_tensor(0)
    wait(to[2], 0)
    first_steps = vectors_to[0] + warp // 4 * 8
    x_step, w_step = steps_at(first_steps)
    while tile < tiles:
        following, following_set = tile + PROGRAMS, tile_set + 1 & SETS - 1
        is_more = following < tiles
        next_place = place_of(following, M, N, GROUP, WEIGHTS)
        copy_vectors(following_set, vectors_to, next_place, vectors, is_more, SLABS, WEIGHTS)
        upper = gl.zeros([ROWS, WIDTH], gl.float32, SUMS)
        lower = gl.zeros([ROWS, WIDTH], gl.float32, SUMS)
        here, there = first_steps + tile_set * (4 * ROOM), first_steps + following_set * (4 * ROOM)
        for i in range(SLABS):
            slot, ahead = slab & SLOTS - 1, slab + AHEAD & SLOTS - 1
            # Slabs beyond the last are those of the next tile; slab AHEAD is on its way already.
            is_here = i < SLABS - AHEAD
            k = (i + AHEAD - gl.where(is_here, 0, SLABS)) * TILE
            products = multiply(xs.index(slot).slice(0, ROWS), ws.index(slot), whole, False)
            upper = rescale(products, (x_step, w_step), upper)
            copy(ahead, k, (i > 0) & (is_here | is_more), to, either(is_here, place, next_place), WEIGHTS)
            products = multiply_again(xs.index(slot).slice(ROWS, ROWS), ws.index(slot), products, M < 0)
            lower = rescale(products, (x_step, w_step), lower)
            arrive(to[2] + 8 * ahead)
            slab += 1
            is_last = i == SLABS - 1
            wait_if((i < SLABS - 1) | is_more, to[2] + 8 * (slab & SLOTS - 1), slab // SLOTS & 1)
            after = gl.where(is_last, there, here + 16 * i + 16)
            x_step, w_step = steps_at(gl.where(is_last & (following >= tiles), here, after))
        copy(slab + AHEAD & SLOTS - 1, AHEAD * TILE, is_more, to, next_place, WEIGHTS)
        finish(
            (upper, lower),
            offsets.index(tile_set),
            shares.index(tile_set),
            (address(scratch) + 32 * tile_set, warp),
            place,
            pick(place[0], y_0, y_1, y_2, WEIGHTS),
            (y_scale, residual, gate, moments),
            M,
            N,
            GELU,
        )
        tile, tile_set, place = following, following_set, next_place
    # The compiler does not see that PTX uses shared memory until the end.
    xs._keep_alive()
    ws._keep_alive()
    barriers._keep_alive()
    steps._keep_alive()
    offsets._keep_alive()
    shares._keep_alive()
    scratch._keep_alive()
