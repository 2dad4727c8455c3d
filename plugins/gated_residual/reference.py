"""The definition of the gated residual. The gate, the product and the sum are each rounded."""

from torch import Tensor


def gated_residual(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """``x + y * gate``.

    Args:
        x_BLD, y_BLD: Residual stream and branch, ``[B, L, D]``, of the same float type.
        gate_BD: Float32 ``[B, D]``, rounded to the type of `x` before it is used.

    Source: TurboDiffusion, rcm/networks/wan2pt1.py (docs/sources.md).
    """
    return x_BLD + y_BLD * gate_BD[:, None].to(x_BLD.dtype)
