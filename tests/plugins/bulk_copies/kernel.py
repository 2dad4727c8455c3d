"""A kernel in Gluon that copies the box of a matrix and that of a view of five dimensions, as two tensor maps tell."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

PAIRS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
BYTES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
NESTED = gl.constexpr(gl.BlockedLayout([1, 1, 1, 1, 16], [1, 1, 2, 2, 8], [2, 2, 1, 1, 1], [4, 3, 2, 1, 0]))


@gluon.jit
def store(y, tile, rows, WIDTH: gl.constexpr):
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, tile.type.layout))[:, None]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, tile.type.layout))[None, :]
    gl.store(y + row * WIDTH + column, tile, mask=row < rows)


@gluon.jit
def copied(x, y, M, view, z, first):
    """Store rows of x, from a place on that is given, and the first box of a view."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    rows = gl.allocate_shared_memory(x.dtype, x.block_shape, x.layout)
    nested = gl.allocate_shared_memory(view.dtype, view.block_shape, view.layout)
    mbarrier.init(barrier, count=1)
    fence_async_shared()
    gl.barrier()
    mbarrier.expect(barrier, x.nbytes_per_cta + view.nbytes_per_cta)
    tma.async_load(x, [first, 64], barrier, rows)
    tma.async_load(view, [0, 0, 0, 0, 128], barrier, nested)
    mbarrier.wait(barrier, 0)
    store(y, rows.load(PAIRS), M, x.block_shape[1])
    tile = nested.load(NESTED).reshape((2 * 4 * 4 * 2, 128))
    store(z, gl.convert_layout(tile, BYTES), 64, 128)
