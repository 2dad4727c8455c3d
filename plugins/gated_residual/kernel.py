"""The kernel of the gated residual, for branches that do not end in a W8A8 linear."""

import triton
import triton.language as tl

from wanforge.plugins.quantiser.kernel import rounded


@triton.jit
def add(
    x, y, gate, out,
    M, y_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """out = x [M, D] + y [M, D] * gate [D]."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    inside = rows < M
    dtype = x.dtype.element_ty
    branch = tl.load(y + rows * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        branch = rounded(branch * rounded(tl.load(gate + columns), dtype), dtype)
    stream = tl.load(x + rows * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows * D + columns, (stream + branch).to(dtype), mask=inside)
