"""The W8A8 linear of `w8a8_linear.kernel.gemm` in Gluon, for `tcgen05` of sm_100. Letters as there.

A program has 128 rows and 256 outputs, and is alone on an SM. A thread has half a row: its 128 float32 sums are in
registers. Products of a slab are integers in tensor memory, which has room for two slabs, so tensor cores multiply slab
i + 1 while threads add slab i, times its scales, to their sums.

All threads meet once for each slab. After that they know three things: the copies of slab i + 1 are there, nobody reads the
integers of slab i - 1 any more, which those of slab i + 1 replace, and nobody multiplies with slab i - 1 any more, whose slot
takes slab i + 3. So there are four slots.

Copies and waits are written in PTX for the reason that `warpgroup_attention.kernel` gives.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fma2,
    mul2,
    tcgen05_mma,
)
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from wanforge.plugins.w8a8_linear.kernel import GELU_CUBIC, GELU_LINEAR, pick
from wanforge.plugins.warpgroup_attention.kernel import (
    BYTES_SHARED,
    PLAIN_SHARED,
    address,
    divided,
    power,
    rounded,
    wait,
    whole_steps,
)
from wanforge.plugins.warpgroup_linear.kernel import (
    EACH,
    PARTS,
    THREADS,
    TILE,
)

SLOTS = gl.constexpr(4)
PIECES = gl.constexpr(4)
PIECE = gl.constexpr(64)
"""Outputs of a piece. With more at a time, the compiler moves integers from register to register."""
HALF_STORED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
BYTES_STORED = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [8, 1], [1, 0]))
SUMS = gl.constexpr(TensorMemoryLayout([128, 128], 1))
PAIRS_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.constexpr_function
def copies(K):
    """PTX of a thread's copies of a slab: eight rows of a weight and four of x."""
    lines = [
        "{",
        ".reg .pred wanted;",
        ".reg .b32 to_x, to_w;",
        ".reg .b64 from_x, from_w, place;",
        "setp.ne.b32 wanted, $2, 0;",
        "mad.lo.s32 to_x, $0, 16384, $3;",
        "mad.lo.s32 to_w, $0, 32768, $4;",
        "mad.wide.s32 from_x, $1, 128, $5;",
        "mad.wide.s32 from_w, $1, 128, $6;",
    ]
    lines += [f"@wanted cp.async.cg.shared.global [to_w + {4096 * i}], [from_w + {32 * K * i}], 16;" for i in range(8)]
    for i in range(4):
        lines += [
            f"cvt.s64.s32 place, ${7 + i};",
            "add.s64 place, place, from_x;",
            f"@wanted cp.async.cg.shared.global [to_x + {4096 * i}], [place], 16;",
        ]
    return "\n".join([*lines, "}"])


@gluon.jit
def factors_at(place):
    """The two float32 at an address of shared memory."""
    return gl.inline_asm("ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [place], (gl.float32, gl.float32))


@gluon.jit
def place_of(M, N: gl.constexpr, GROUP: gl.constexpr):
    """`w8a8_linear.kernel.place_of`: the row of a program's tile, and which 256 columns it has."""
    columns: gl.constexpr = N // (PARTS * TILE)
    tile, row_tiles = gl.program_id(0), gl.cdiv(M, TILE)
    first_row = tile // (GROUP * columns) * GROUP
    group = gl.minimum(row_tiles - first_row, GROUP)
    return first_row + tile % (GROUP * columns) % group, tile % (GROUP * columns) // group


@gluon.jit
def copy(slab, is_wanted, to, origin, K: gl.constexpr):
    """Begin a thread's copies of a slab as a group, which is empty if the slab is not wanted. `to` are the addresses of its rows
    of x and of its rows of a weight; `origin` is where both begin, and how far from there its rows of x are."""
    x, w, rows = origin
    gl.inline_asm(
        copies(K),
        "r,r,r,r,r,l,l,r,r,r,r",
        [slab % SLOTS, slab, is_wanted.to(gl.int32), to[0], to[1], x, w, rows[0], rows[1], rows[2], rows[3]],
    )
    gl.inline_asm("cp.async.commit_group;")


@gluon.jit
def meet(left: gl.constexpr):
    """Wait until at most so many groups of copies are on their way, one or two, and for the other threads. What they
    have copied may be multiplied after that, and what they have loaded from tensor memory replaced."""
    gl.inline_asm("cp.async.wait_group 2;" if left == 2 else "cp.async.wait_group 1;")
    fence_async_shared()
    gl.inline_asm("tcgen05.fence::before_thread_sync;")
    gl.barrier()
    gl.inline_asm("tcgen05.fence::after_thread_sync;")


@gluon.jit
def commit(barrier, is_wanted):
    """Arrive at the mbarrier at an address once the products are complete that a thread has begun, which is the one that is
    elected of the first warp."""
    gl.inline_asm(
        """{
        .reg .pred elected, wanted, first;
        .reg .b32 thread;
        elect.sync thread|elected, -1;
        mov.u32 thread, %tid.x;
        setp.lt.u32 first, thread, 32;
        setp.ne.b32 wanted, $1, 0;
        and.pred wanted, wanted, first;
        and.pred wanted, wanted, elected;
        @wanted tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [$0];
        }""",
        "r,r",
        [barrier, is_wanted.to(gl.int32)],
    )


@gluon.jit
def multiply(slab, is_wanted, xs, ws, products, barriers):
    """Begin the products of a slab, if it is wanted, and arrive at its mbarrier once they are complete."""
    slot, turn = slab % SLOTS, slab % 2
    for part in gl.static_range(PARTS):
        w, result = ws.index(PARTS * slot + part).permute((1, 0)), products.index(PARTS * turn + part)
        tcgen05_mma(xs.index(slot), w, result, use_acc=False, pred=is_wanted, mbarriers=[])
    commit(barriers + 8 * turn, is_wanted)


@gluon.jit
def reciprocals(x):
    """1 / x of numbers from 1 to 2^63, two of them by one reciprocal of their product."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 both;
        mul.rn.f32 both, $2, $3;
        rcp.approx.ftz.f32 both, both;
        mul.rn.f32 $0, both, $3;
        mul.rn.f32 $1, both, $2;
        }""",
        "=f,=f,f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def gelu(x):
    """`w8a8_linear.kernel.gelu`. Where its exponent is larger than 60, it is less than 2^-54."""
    exponent = mul2(x, fma2(mul2(x, x), -GELU_CUBIC, -GELU_LINEAR))
    return mul2(x, reciprocals(1.0 + power(gl.minimum(exponent, 60.0))))


@gluon.jit
def epilogue(total, bias, gate, GELU: gl.constexpr):
    """Apply bias, GELU and gate to a piece of a product that was rounded to the compute type. It lies as it is stored, so
    that a thread needs few of the biases and gates, which are in shared memory. The result is in float32."""
    compute: gl.constexpr = total.dtype
    columns: gl.constexpr = gl.SliceLayout(0, total.type.layout)
    total = rounded(total.to(gl.float32) + bias.load(columns)[None, :], compute)
    if GELU:
        total = rounded(gelu(total), compute)
    if gate is not None:
        total = rounded(total * gate.load(columns)[None, :], compute)
    return total


@gluon.jit
def store_moments(x, moments, row, column, M, N: gl.constexpr):
    """Store the moments of the rows of a tile as it is stored: x is [128, 64, 2], and the order of its columns does not matter."""
    x = x.to(gl.float32).reshape((TILE, TILE))
    mean = gl.sum(x, 1) * (1.0 / TILE)
    distance = x - gl.expand_dims(mean, 1)
    rows = gl.arange(0, TILE, mean.type.layout)
    place = moments + column * M + row + rows
    gl.store(place, mean, mask=rows < M - row)
    gl.store(place + N // TILE * M, gl.sum(distance * distance, 1), mask=rows < M - row)


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
    """`w8a8_linear.kernel.gemm` of multiples of 256 outputs, with biases of 16 bits."""
    SLABS: gl.constexpr = K // TILE
    which = gl.program_id(1)
    row_tile, columns = place_of(M, N, GROUP)
    weight, scale = pick(which, weight_0, weight_1, weight_2, WEIGHTS), pick(which, scale_0, scale_1, scale_2, WEIGHTS)
    bias, y = pick(which, bias_0, bias_1, bias_2, WEIGHTS), pick(which, y_0, y_1, y_2, WEIGHTS)
    compute: gl.constexpr = bias.dtype.element_ty

    # Loads return in order, so all that is small is asked for ahead of the slabs.
    thread = gl.arange(0, THREADS, EACH)
    k = gl.minimum(thread, SLABS - 1)
    scale += columns.to(gl.int64) * (PARTS * SLABS)
    x_step = gl.load(x_scale + row_tile.to(gl.int64) * SLABS + k)
    steps = gl.join(x_step * gl.load(scale + k), x_step * gl.load(scale + SLABS + k))
    offset = gl.load(bias + columns * (PARTS * TILE) + thread).to(gl.float32)
    if gate is not None:
        share = rounded(gl.load(gate + columns * (PARTS * TILE) + thread).to(gl.float32), compute)

    xs = gl.allocate_shared_memory(gl.int8, [SLOTS, TILE, TILE], BYTES_SHARED)
    ws = gl.allocate_shared_memory(gl.int8, [PARTS * SLOTS, TILE, TILE], BYTES_SHARED)
    barriers = mbarrier.allocate_mbarrier(batch=2)
    for each in gl.static_range(2):
        mbarrier.init(barriers.index(each), count=1)
    products = allocate_tensor_memory(gl.int32, [2 * PARTS, TILE, TILE], SUMS)
    row, chunk = thread // 8, thread % 8
    rows = ()
    for i in gl.static_range(4):
        # A ragged tile reads its last row again: values outside are never stored, and change no largest magnitude.
        rows += (gl.minimum(row + 32 * i, M - 1 - row_tile * TILE) * K,)
    x += (row_tile * TILE).to(gl.int64) * K
    weight += (columns * (PARTS * TILE)).to(gl.int64) * K
    origin = (x + chunk * 16, weight + (row * K + chunk * 16), rows)
    swizzled = row * TILE + (chunk ^ row % 8) * 16
    to, barrier = (address(xs) + swizzled, address(ws) + swizzled), address(barriers)
    for slab in gl.static_range(SLOTS - 1):
        copy(slab, gl.to_tensor(slab < SLABS), to, origin, K)
    factors = gl.allocate_shared_memory(gl.float32, [THREADS, 2], PAIRS_SHARED, steps)
    offsets = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, offset)
    if gate is not None:
        shares = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, share)
    meet(2)
    multiply(0, gl.to_tensor(True), xs, ws, products, barrier)

    factor = address(factors)
    layout: gl.constexpr = products.index(0).slice(0, PIECE).get_reg_layout()
    zero = gl.zeros([TILE, PIECE], gl.float32, layout)
    sums = (zero, zero, zero, zero)
    for i in range(SLABS):
        first, second = factors_at(factor + 8 * i)
        meet(1)
        multiply(i + 1, i + 1 < SLABS, xs, ws, products, barrier)
        turn = i % 2
        wait(barrier + 8 * turn, i // 2 & 1)
        gl.inline_asm("tcgen05.fence::after_thread_sync;")
        rescaled = ()
        for piece in gl.static_range(PIECES):
            integers = products.index(PARTS * turn + piece // 2).slice(piece % 2 * PIECE, PIECE).load(layout)
            rescaled += (gl.fma(integers.to(gl.float32), first if piece < 2 else second, sums[piece]),)
            if piece == 1:
                copy(i + 3, i + 3 < SLABS, to, origin, K)
        sums = rescaled
    gl.barrier()
    stored: gl.constexpr = BYTES_STORED if y_scale is not None else HALF_STORED
    row = gl.arange(0, TILE, gl.SliceLayout(1, stored))[:, None]
    inside = row < M - row_tile * TILE
    start = (row_tile * TILE).to(gl.int64) * N + columns * (PARTS * TILE)
    place = row * N + gl.arange(0, PIECE, gl.SliceLayout(0, stored))[None, :]
    if residual is not None:
        before = ()
        for piece in gl.static_range(PIECES):
            before += (gl.load(residual + start + piece * PIECE + place, mask=inside, other=0.0),)
    for part in gl.static_range(PARTS):
        totals = ()
        for piece in gl.static_range(2 * part, 2 * part + 2):
            share = None if gate is None else shares.slice(piece * PIECE, PIECE)
            total = gl.convert_layout(sums[piece].to(compute), stored)
            totals += (epilogue(total, offsets.slice(piece * PIECE, PIECE), share, GELU),)
        if y_scale is not None:
            largest = gl.maximum(gl.abs(totals[0]), gl.abs(totals[1]))
            amax = gl.maximum(gl.max(largest.reshape((TILE * PIECE,)), 0), 1e-8)
            gl.store(y_scale + row_tile.to(gl.int64) * (N // TILE) + columns * PARTS + part, amax * (1.0 / 128.0))
            factor = divided(128.0, amax)
        kept = ()
        for piece in gl.static_range(2 * part, 2 * part + 2):
            total = totals[piece - 2 * part]
            if y_scale is not None:
                total = whole_steps(gl.minimum(total * factor, 127.0))
            elif residual is not None:
                total += before[piece].to(gl.float32)
            total = total.to(y.dtype.element_ty)
            kept += (total,)
            gl.store(y + start + piece * PIECE + place, total, mask=inside)
        if moments is not None:
            store_moments(gl.join(kept[0], kept[1]), moments, row_tile * TILE, PARTS * columns + part, M, N)
    barriers._keep_alive()
