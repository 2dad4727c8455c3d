"""The W8A8 linear of `w8a8_linear.kernel.gemm` in Gluon, for `wgmma` of sm_90. Letters as there."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from wanforge.plugins.quantiser.kernel import ROUND
from wanforge.plugins.warpgroup_attention.kernel import (
    BYTES_SHARED,
    PLAIN_SHARED,
    address,
    divided,
    in_place,
    multiply,
    registers,
    rounded,
    wait,
    wait_for_all,
    whole_steps,
)

TILE = gl.constexpr(128)
PARTS = gl.constexpr(2)
THREADS = gl.constexpr(256)
GELU_LINEAR = gl.constexpr(2.302208198144325)
GELU_CUBIC = gl.constexpr(0.1029432395800235)

SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 32]))
COLUMNS = gl.constexpr(gl.SliceLayout(0, SUMS))
HALF_STORED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))
BYTES_STORED = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0]))
PAIRS_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
EACH = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))


@gluon.constexpr_function
def row_copy(i):
    """PTX of a copy of a row of x."""
    return [
        f"cvt.s64.s32 place, ${{rows{i}}};",
        "add.s64 place, place, x;",
        f"@wanted cp.async.cg.shared.global [x_slot + {4096 * i}], [place], 16;",
    ]


@gluon.constexpr_function
def weight_copy(i, K):
    return [f"@wanted cp.async.cg.shared.global [w_slot + {4096 * i}], [w + {32 * K * i}], 16;"]


@gluon.constexpr_function
def copies(K, which):
    """PTX of a thread's copies of a slab, each as some lines: of the first half of the weight, of the rest, or of all.
    """
    halves = {
        "first": [weight_copy(i, K) for i in range(4)],
        "rest": [copy for i in range(4) for copy in (row_copy(i), weight_copy(4 + i, K))],
    }
    return halves.get(which) or [*halves["first"], *halves["rest"]]


@gluon.constexpr_function
def with_places(lines, start):
    """PTX whose copies' places are operands from number `start`."""
    names = ("to_x", "to_w", "slot", "from_x", "from_w", "k", "wanted", "rows0", "rows1", "rows2", "rows3")
    text = "\n".join(
        [
            "{",
            ".reg .pred wanted;",
            ".reg .b32 product;",
            ".reg .b32 x_slot, w_slot;",
            ".reg .b64 x, w, place;",
            "setp.ne.b32 wanted, ${wanted}, 0;",
            "mad.lo.s32 x_slot, ${slot}, 16384, ${to_x};",
            "mad.lo.s32 w_slot, ${slot}, 32768, ${to_w};",
            "mad.wide.s32 x, ${k}, 128, ${from_x};",
            "mad.wide.s32 w, ${k}, 128, ${from_w};",
            *lines,
            "}",
        ]
    )
    for number, name in enumerate(names):
        text = text.replace(f"${{{name}}}", f"${start + number}")
    return text


PLACES = gl.constexpr("r,r,r,l,l,r,r,r,r,r,r")


@gluon.constexpr_function
def copying(K, which):
    return with_places([line for copy in copies(K, which) for line in copy], 0)


@gluon.constexpr_function
def rescaled(K, which, count):
    """PTX that waits for products, adds them, times a factor, to sums, and begins copies meanwhile."""
    lines, begun = ["wgmma.wait_group.sync.aligned 0;"], copies(K, which)
    for i in range(count):
        lines += [f"cvt.rn.f32.s32 product, ${count + i};", f"fma.rn.f32 ${i}, product, ${3 * count}, ${i};"]
        if i % (count // len(begun)) == 0:
            lines += begun[i // (count // len(begun))]
    return with_places(lines, 3 * count + 1)


@gluon.constexpr_function
def rescaling(count):
    tied = ",".join([*["=f"] * count, *["r"] * count, *map(str, range(count)), "f"])
    return f"{tied},{PLACES.value if hasattr(PLACES, 'value') else PLACES}"


@gluon.jit
def copy(slab, k, is_wanted, to, origin, which: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr):
    """Begin a thread's copies of slab `k` of a tile, which is the `slab`th of the program, if they are wanted."""
    rows = origin[2]
    gl.inline_asm(
        copying(K, which),
        PLACES,
        [to[0], to[1], slab & SLOTS - 1, origin[0], origin[1], k, is_wanted.to(gl.int32), rows[0], rows[1], rows[2], rows[3]],
    )


@gluon.jit
def rescale(products, sums, factor, slab, k, is_wanted, to, origin, which: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr):
    rows = origin[2]
    return gl.inline_asm(
        rescaled(K, which, 64),
        rescaling(64),
        [registers(products), sums, factor, to[0], to[1], slab & SLOTS - 1, origin[0], origin[1], k, is_wanted.to(gl.int32), rows[0], rows[1], rows[2], rows[3]],
        sums.type,
    )


@gluon.jit
def arrive(slab, arrived, SLOTS: gl.constexpr):
    gl.inline_asm("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", "r", [arrived + 8 * (slab & SLOTS - 1)])


@gluon.jit
def gelu(x):
    """`w8a8_linear.kernel.gelu`."""
    exponent = x * gl.fma(x * x, -GELU_CUBIC, -GELU_LINEAR)
    return x / (1.0 + gl.exp2(gl.minimum(exponent, 115.0)))


@gluon.jit
def pick(which, first, second, third, WEIGHTS: gl.constexpr):
    """`w8a8_linear.kernel.pick`."""
    chosen = first
    if WEIGHTS > 1:
        if which == 1:
            chosen = second
    if WEIGHTS > 2:
        if which == 2:
            chosen = third
    return chosen


@gluon.jit
def place_of(tile, M, N, GROUP: gl.constexpr):
    """`w8a8_linear.kernel.place_of` of a tile."""
    row_tiles, column_tiles = gl.cdiv(M, TILE), gl.cdiv(N, PARTS * TILE)
    first_row = tile // (GROUP * column_tiles) * GROUP
    group = gl.minimum(row_tiles - first_row, GROUP)
    return first_row + tile % (GROUP * column_tiles) % group, tile % (GROUP * column_tiles) // group


@gluon.jit
def finish(total, row_tile, column_tile, bias, residual, gate, y, y_scale, M, N, compute: gl.constexpr, GELU: gl.constexpr):
    """`w8a8_linear.kernel.finish` of a tile, given its part of the bias and of the gate in shared memory."""
    total = rounded(rounded(total, compute) + bias.load(COLUMNS)[None, :], compute)
    if GELU:
        total = rounded(gelu(total), compute)
    if gate is not None:
        total = rounded(total * gate.load(COLUMNS)[None, :], compute)
    start = (row_tile * TILE).to(gl.int64) * N + column_tile * TILE
    if y_scale is not None:
        amax = gl.maximum(gl.max(gl.abs(total).reshape((TILE * TILE,)), 0), 1e-8)
        steps = whole_steps(gl.minimum(total * divided(128.0, amax), 127.0))
        rows = gl.arange(0, TILE, gl.SliceLayout(1, BYTES_STORED))[:, None]
        place = rows * N + gl.arange(0, TILE, gl.SliceLayout(0, BYTES_STORED))[None, :]
        gl.store(y + start + place, gl.convert_layout(steps, BYTES_STORED), mask=rows < M - row_tile * TILE)
        gl.store(y_scale + row_tile.to(gl.int64) * (N // TILE) + column_tile, amax * (1.0 / 128.0))
    else:
        rows = gl.arange(0, TILE, gl.SliceLayout(1, HALF_STORED))[:, None]
        place = rows * N + gl.arange(0, TILE, gl.SliceLayout(0, HALF_STORED))[None, :]
        inside = rows < M - row_tile * TILE
        values = gl.convert_layout(total.to(compute), HALF_STORED)
        if residual is not None:
            values = values.to(gl.float32) + gl.load(residual + start + place, mask=inside, other=0.0).to(gl.float32)
        gl.store(y + start + place, values.to(y.dtype.element_ty), mask=inside)


@gluon.jit
def factors_at(place):
    """The two float32 at an address of shared memory."""
    return gl.inline_asm("ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [place], (gl.float32, gl.float32))


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
    SLOTS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """`w8a8_linear.kernel.gemm`."""
    SLABS: gl.constexpr = K // TILE
    AHEAD: gl.constexpr = SLOTS // 2
    which = gl.program_id(1)
    row_tile, column_tile = place_of(gl.program_id(0), M, N, GROUP)
    weight, scale = pick(which, weight_0, weight_1, weight_2, WEIGHTS), pick(which, scale_0, scale_1, scale_2, WEIGHTS)
    bias, y = pick(which, bias_0, bias_1, bias_2, WEIGHTS), pick(which, y_0, y_1, y_2, WEIGHTS)

    thread = gl.arange(0, THREADS, EACH)
    k = gl.minimum(thread, SLABS - 1)
    scale += column_tile.to(gl.int64) * (PARTS * SLABS)
    x_step = gl.load(x_scale + row_tile.to(gl.int64) * SLABS + k)
    first_step, second_step = gl.load(scale + k), gl.load(scale + SLABS + k)
    column = column_tile * (PARTS * TILE) + thread
    compute: gl.constexpr = bias.dtype.element_ty
    biases, gates = gl.load(bias + column).to(gl.float32), None
    if gate is not None:
        gates = gl.load(gate + column).to(gl.float32)
    xs = gl.allocate_shared_memory(gl.int8, [SLOTS, TILE, TILE], BYTES_SHARED)
    ws = gl.allocate_shared_memory(gl.int8, [PARTS * SLOTS, TILE, TILE], BYTES_SHARED)
    barriers = mbarrier.allocate_mbarrier(batch=SLOTS)
    for i in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(i), count=THREADS)
    gl.barrier()
    row, chunk = thread // 8, thread % 8
    arrived = address(barriers)
    swizzled = row * TILE + (chunk ^ row % 8) * 16
    to = (address(xs) + swizzled, address(ws) + swizzled)
    rows = ()
    for i in gl.static_range(4):
        rows += (gl.minimum(row + 32 * i, M - 1 - row_tile * TILE) * K,)
    x_from = x + (row_tile * TILE).to(gl.int64) * K + chunk * 16
    w_from = weight + (column_tile * (PARTS * TILE)).to(gl.int64) * K + (row * K + chunk * 16)
    origin = (x_from, w_from, rows)
    for i in gl.static_range(AHEAD):
        copy(i, i, gl.to_tensor(i < SLABS), to, origin, "all", K, SLOTS)
        arrive(i, arrived, SLOTS)
    pairs = gl.join(x_step * first_step, x_step * second_step)
    factors = gl.allocate_shared_memory(gl.float32, [THREADS, 2], PAIRS_SHARED, pairs)
    biases = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, biases)
    if gate is not None:
        gates = gl.allocate_shared_memory(gl.float32, [THREADS], PLAIN_SHARED, rounded(gates, compute))
    gl.barrier()
    factor = address(factors)
    left = gl.zeros([TILE, TILE], gl.float32, SUMS)
    right = gl.zeros([TILE, TILE], gl.float32, SUMS)
    zeros = gl.zeros([TILE, TILE], gl.int32, SUMS)
    for k in range(SLABS):
        slot, later = k & SLOTS - 1, k + AHEAD
        first, second = factors_at(factor + 8 * k)
        wait(arrived + 8 * slot, k // SLOTS & 1)
        fence_async_shared()
        products = multiply(xs.index(slot), ws.index(PARTS * slot), zeros, False)
        left = rescale(products, left, first, later, later, later < SLABS, to, origin, "first", K, SLOTS)
        products = multiply(xs.index(slot), ws.index(PARTS * slot + 1), zeros, False)
        right = rescale(products, right, second, later, later, later < SLABS, to, origin, "rest", K, SLOTS)
        arrive(later, arrived, SLOTS)
    gl.barrier()
    for part in gl.static_range(PARTS):
        part_gate = None if gate is None else gates.slice(part * TILE, TILE)
        finish(left if part == 0 else right, row_tile, PARTS * column_tile + part, biases.slice(part * TILE, TILE), residual, part_gate, y, y_scale, M, N, compute, GELU)
    barriers._keep_alive()
