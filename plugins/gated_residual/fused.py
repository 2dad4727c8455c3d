"""The gated residual as a kernel."""

from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import Kernel

ADD = Kernel("gated_residual", "add", ("cdiv(M, ROWS)", "D // 128"), {"M": "i32", "y_stride": "i32:16"})


def add_gated(x_LD: Tensor, y_LD: Tensor, gate_D: Tensor | None, out_LD: Tensor) -> Tensor:
    """Write ``x + y * gate`` to `out`, which may be `x`; without a gate, add `y` itself. Rows of `y` may be strided."""
    rows, width = x_LD.shape
    if y_LD.shape != x_LD.shape or width % 128 or not x_LD.is_contiguous() or y_LD.stride(1) != 1:
        raise ShapeError(
            f"x {tuple(x_LD.shape)} and y {tuple(y_LD.shape)} do not fit; the width must be a multiple of 128"
        )
    ADD(x=x_LD, y=y_LD, gate=gate_D, out=out_LD, M=rows, y_stride=y_LD.stride(0), D=width)
    return out_LD
