"""The W8A8 linear of `w8a8_linear.kernel.gemm` in Gluon, for `wgmma` of sm_90. Letters as there.

A program has 128 rows and 256 outputs, which reads three quarters of what tiles of 128x128 read from the L2 cache. Each of
its two warpgroups has 64 rows, and multiplies a slab in two halves, because the sums of both and the integers of one fill
its registers. It rescales one half while the other warpgroup multiplies, so no barrier may hold both, and none is in the
loop:

- Every thread copies its part of slab i + AHEAD in iteration i, once it has rescaled what it multiplied with the slot, and
  arrives at the mbarrier of the slot when its copies do.
- A thread waits at the mbarrier of slab i in iteration i. Every other thread then has ended iteration i - AHEAD at least,
  so nobody reads slab i - AHEAD any more, and its slot takes slab i + AHEAD: there are 2 AHEAD slots.

Copies, waits and the rescaling are written in PTX: copies and waits for the reason that `warpgroup_attention.kernel` gives, the
rescaling because the compiler would put it after the next product, for which there are no registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from wanforge.plugins.w8a8_linear.kernel import GELU_CUBIC, GELU_LINEAR, pick
from wanforge.plugins.warpgroup_attention.kernel import (
    BYTES_SHARED,
    PLAIN_SHARED,
    address,
    divided,
    multiply,
    power,
    registers,
    rounded,
    wait,
    whole_steps,
)

TILE = gl.constexpr(128)
PARTS = gl.constexpr(2)
THREADS = gl.constexpr(256)
VALUES = gl.constexpr(64)
"""The sums of a thread in one part of a tile."""

SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 32]))
COLUMNS = gl.constexpr(gl.SliceLayout(0, SUMS))
HALF_STORED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))
BYTES_STORED = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0]))
EACH = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
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
def copy(slot, slab, is_wanted, to, origin, K: gl.constexpr):
    """Begin a thread's copies of a slab, if it is wanted, and arrive at the mbarrier of its slot once they do. `to` are the
    addresses of its rows of x, of its rows of a weight and of the first mbarrier; `origin` is where both begin, and how far
    from there its rows of x are."""
    x, w, rows = origin
    gl.inline_asm(
        copies(K),
        "r,r,r,r,r,l,l,r,r,r,r",
        [slot, slab, is_wanted.to(gl.int32), to[0], to[1], x, w, rows[0], rows[1], rows[2], rows[3]],
    )
    gl.inline_asm("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", "r", [to[2] + 8 * slot])


@gluon.constexpr_function
def rescaling(outputs, inputs):
    """PTX that waits for products and adds them, times a factor, to sums."""
    products, _, (factor,) = inputs
    lines = ["{", ".reg .b32 product;", "wgmma.wait_group.sync.aligned 0;"]
    for total, product in zip(outputs[0], products, strict=True):
        lines += [f"cvt.rn.f32.s32 product, {product};", f"fma.rn.f32 {total}, product, {factor}, {total};"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def tied(count):
    """Constraints of sums, products, the sums that they are added to, and a factor."""
    return ",".join(["=f"] * count + ["r"] * count + [str(i) for i in range(count)] + ["f"])


@gluon.jit
def rescale(products, factor, sums):
    """Add products, once they are complete, times a factor to sums."""
    return gl.inline_asm(rescaling, tied(VALUES), [registers(products), sums, factor], sums.type)


@gluon.jit
def multiply_again(a, b, products, never):
    """A product that begins in the registers of another, which are no longer needed. `never` is false, which the compiler
    does not know: if it did, it would take other registers, and use up those of the sums."""
    return warpgroup_mma(a, b.permute((1, 0)), registers(products), use_acc=never, is_async=True)


@gluon.jit
def factors_at(place):
    """The two float32 at an address of shared memory."""
    return gl.inline_asm("ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [place], (gl.float32, gl.float32))


@gluon.jit
def reciprocal(x):
    """1 / x, of normal size."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def gelu(x):
    """`w8a8_linear.kernel.gelu`."""
    exponent = x * gl.fma(x * x, -GELU_CUBIC, -GELU_LINEAR)
    return x * reciprocal(1.0 + power(gl.minimum(exponent, 115.0)))


@gluon.jit
def place_of(M, N: gl.constexpr, GROUP: gl.constexpr):
    """`w8a8_linear.kernel.place_of`: the row of a program's tile, and which 256 columns it has."""
    columns: gl.constexpr = N // (PARTS * TILE)
    tile, row_tiles = gl.program_id(0), gl.cdiv(M, TILE)
    first_row = tile // (GROUP * columns) * GROUP
    group = gl.minimum(row_tiles - first_row, GROUP)
    return first_row + tile % (GROUP * columns) % group, tile % (GROUP * columns) // group


@gluon.jit
def finish(total, place, M, N: gl.constexpr, after, y, y_scale, compute: gl.constexpr, GELU: gl.constexpr):
    """`w8a8_linear.kernel.finish` of a tile at a row and a column of tiles. `after` are its bias and its gate, which are in
    shared memory, and the residual."""
    row_tile, column_tile = place
    bias, gate, residual = after
    total = rounded(rounded(total, compute) + bias.load(COLUMNS)[None, :], compute)
    if GELU:
        total = rounded(gelu(total), compute)
    if gate is not None:
        total = rounded(total * gate.load(COLUMNS)[None, :], compute)
    start = (row_tile * TILE).to(gl.int64) * N + column_tile * TILE
    stored: gl.constexpr = BYTES_STORED if y_scale is not None else HALF_STORED
    rows = gl.arange(0, TILE, gl.SliceLayout(1, stored))[:, None]
    inside = rows < M - row_tile * TILE
    values = rows * N + gl.arange(0, TILE, gl.SliceLayout(0, stored))[None, :]
    if y_scale is not None:
        amax = gl.maximum(gl.max(gl.abs(total).reshape((TILE * TILE,)), 0), 1e-8)
        steps = whole_steps(gl.minimum(total * divided(128.0, amax), 127.0))
        gl.store(y + start + values, gl.convert_layout(steps, stored), mask=inside)
        gl.store(y_scale + row_tile.to(gl.int64) * (N // TILE) + column_tile, amax * (1.0 / 128.0))
    else:
        total = gl.convert_layout(total.to(compute), stored)
        if residual is not None:
            total = total.to(gl.float32) + gl.load(residual + start + values, mask=inside, other=0.0).to(gl.float32)
        gl.store(y + start + values, total.to(y.dtype.element_ty), mask=inside)


@gluon.jit
def gemm(
    x, x_scale,
    weight_0, weight_1, weight_2,
    scale_0, scale_1, scale_2,
    bias_0, bias_1, bias_2,
    y_0, y_1, y_2,
    y_scale, residual, gate,
    M,
    N: gl.constexpr,
    K: gl.constexpr,
    GELU: gl.constexpr,
    WEIGHTS: gl.constexpr,
    AHEAD: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """`w8a8_linear.kernel.gemm` of multiples of 256 outputs, with biases of 16 bits."""
    SLOTS: gl.constexpr = 2 * AHEAD
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
    barriers = mbarrier.allocate_mbarrier(batch=SLOTS)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=THREADS)
    gl.barrier()
    row, chunk = thread // 8, thread % 8
    rows = ()
    for i in gl.static_range(4):
        # A ragged tile reads its last row again: values outside are never stored, and change no largest magnitude.
        rows += (gl.minimum(row + 32 * i, M - 1 - row_tile * TILE) * K,)
    x += (row_tile * TILE).to(gl.int64) * K
    weight += (columns * (PARTS * TILE)).to(gl.int64) * K
    origin = (x + chunk * 16, weight + (row * K + chunk * 16), rows)
    swizzled = row * TILE + (chunk ^ row % 8) * 16
    to = (address(xs) + swizzled, address(ws) + swizzled, address(barriers))
    for slab in gl.static_range(AHEAD):
        copy(slab, slab, gl.to_tensor(slab < SLABS), to, origin, K)
    factors = gl.allocate_shared_memory(gl.float32, [THREADS, 2], PAIRS_SHARED, steps)
    offsets = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, offset)
    if gate is not None:
        shares = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, share)
    gl.barrier()

    factor = address(factors)
    whole = gl.zeros([TILE, TILE], gl.int32, SUMS)
    left = gl.zeros([TILE, TILE], gl.float32, SUMS)
    right = gl.zeros([TILE, TILE], gl.float32, SUMS)
    for i in range(SLABS):
        place = i & SLOTS - 1
        first, second = factors_at(factor + 8 * i)
        wait(to[2] + 8 * place, i // SLOTS & 1)
        fence_async_shared()
        products = multiply(xs.index(place), ws.index(PARTS * place), whole, False)
        left = rescale(products, first, left)
        products = multiply_again(xs.index(place), ws.index(PARTS * place + 1), products, M < 0)
        right = rescale(products, second, right)
        copy(i + AHEAD & SLOTS - 1, i + AHEAD, i + AHEAD < SLABS, to, origin, K)
    gl.barrier()
    for part in gl.static_range(PARTS):
        total, place = left if part == 0 else right, (row_tile, PARTS * columns + part)
        if gate is None:
            after = (offsets.slice(part * TILE, TILE), None, residual)
        else:
            after = (offsets.slice(part * TILE, TILE), shares.slice(part * TILE, TILE), residual)
        finish(total, place, M, N, after, y, y_scale, compute, GELU)
    barriers._keep_alive()
