"""`row_moments.kernel.store_moments` in Gluon, for tensors whose threads have 8 values side by side in each of 8 rows, as 16
threads of a warp do. The rows of other threads lie between those of a thread: see `strides`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

PIECE = gl.constexpr(128)
EACH = gl.constexpr(8)
"""Values of a thread in a row, and rows of a thread."""
HALVES = {8: "0f40800000", 16: "0f41000000", 32: "0f41800000", 64: "0f42000000"}
"""Half of a number of values, in PTX."""
MERGED = gl.constexpr(",".join(["=&f"] * 2 + ["=&r"] + ["f"] * 16 + ["r"] * 3))


@gluon.constexpr_function
def merging(outputs, inputs):
    """PTX that merges the moments of 8 values of 8 rows with those of 15 other threads, after Chan et al. A thread
    gives away half of its rows at a time, so that it has one in the end. Its number is worked out here as well: if the
    compiler did that before the loops that come first, it would keep it in a register."""
    means, squares, (of_warps,), (of_halves,), (apart,) = inputs
    lines = ["{", ".reg .b32 lane, warp, bit;", ".reg .pred high;", ".reg .b32 apart;", "mov.u32 lane, %tid.x;"]
    lines += ["shr.u32 warp, lane, 5;", "and.b32 lane, lane, 31;"]
    values, half = EACH.value, EACH.value // 2
    for bit in (8, 4, 2, 1):
        given = {"mean": [], "square": []}
        kept = {"mean": [], "square": []}
        if half:
            lines += [f"and.b32 bit, lane, {bit};", "setp.ne.u32 high, bit, 0;"]
        for name, rows in (("mean", means), ("square", squares)):
            for i in range(half or 1):
                one, other = f"{name}_{bit}_{i}", f"{name}_{bit}_{i}_given"
                lines += [f".reg .b32 {one}, {other};"]
                first, second = (rows[i], rows[i + half]) if half else (rows[0], rows[0])
                if half:
                    lines += [
                        f"selp.f32 {one}, {second}, {first}, high;",
                        f"selp.f32 {other}, {first}, {second}, high;",
                    ]
                else:
                    lines += [f"mov.f32 {one}, {first};", f"mov.f32 {other}, {first};"]
                lines += [f"shfl.sync.bfly.b32 {other}, {other}, {bit}, 31, -1;"]
                kept[name].append(one)
                given[name].append(other)
        for mean, square, other_mean, other_square in zip(
            kept["mean"], kept["square"], given["mean"], given["square"], strict=True
        ):
            lines += [
                f"sub.f32 apart, {mean}, {other_mean};",
                f"fma.rn.f32 {mean}, apart, 0fBF000000, {mean};",
                f"add.f32 {square}, {square}, {other_square};",
                "mul.f32 apart, apart, apart;",
                f"fma.rn.f32 {square}, apart, {HALVES[values]}, {square};",
            ]
        means, squares, values, half = kept["mean"], kept["square"], 2 * values, half // 2
    lines += [f"mov.f32 {outputs[0][0]}, {means[0]};", f"mov.f32 {outputs[1][0]}, {squares[0]};"]
    row = outputs[2][0]
    lines += [
        f"mul.lo.u32 {row}, warp, {of_warps};",
        "bfe.u32 bit, lane, 1, 3;",
        f"mad.lo.u32 {row}, bit, {apart}, {row};",
    ]
    lines += ["shr.u32 bit, lane, 4;", f"mad.lo.u32 {row}, bit, {of_halves}, {row};"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def strides(rows):
    """How far the rows of a warp are from those of the one before it, those of the second half of its threads from those of
    the first, and those of a thread from each other."""
    return 2, 1, rows // EACH.value


@gluon.constexpr_function
def one_row_each(rows):
    """The layout of one row per thread that `merging` leaves, in pairs of threads that have the same."""
    of_warps, of_halves, apart = strides(rows)
    warps = [[of_warps << i] for i in range((rows // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout([], [[0], [apart], [2 * apart], [4 * apart], [of_halves]], warps, [], [rows])


@gluon.jit
def store_moments(x, moments, row, column, M, N: gl.constexpr):
    """Store the moments of some rows of a matrix [M, N] from `row` on, in piece `column` of their columns. x is in
    float32, as it is stored."""
    ROWS: gl.constexpr = x.shape[0]
    ROW: gl.constexpr = one_row_each(ROWS)
    APART: gl.constexpr = strides(ROWS)
    few = x.reshape((ROWS, PIECE // EACH, EACH))
    means = gl.sum(few, 2) * (1.0 / EACH)
    distance = few - gl.expand_dims(means, 2)
    squares = gl.sum(distance * distance, 2)
    TYPE: gl.constexpr = gl.distributed_type(gl.float32, [ROWS], ROW)
    NUMBER: gl.constexpr = gl.distributed_type(gl.int32, [ROWS], ROW)
    mean, square, rows = gl.inline_asm(
        merging, MERGED, [means, squares, APART[0], APART[1], APART[2]], (TYPE, TYPE, NUMBER)
    )
    place = column * M + row + rows
    inside = rows < M - row
    gl.store(moments + place, mean, mask=inside)
    gl.store(moments + N // PIECE * M + place, square, mask=inside)
