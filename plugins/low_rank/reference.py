"""The definition of the product of low rank beside a linear."""

from torch import Tensor
from torch.nn import functional as F


def add_low_rank(y: Tensor, x: Tensor, down_RK: Tensor, up_NR: Tensor) -> Tensor:
    """``y + (x @ A.T) @ B.T``: what a linear computes, and what LoRAs add to it.

    The factors of several LoRAs lie side by side along R, so that their products add up, and taking one away leaves the
    others to the bit. Both products and the sum are rounded to the type of `x`.

    Args:
        y: ``[..., N]``, the output of the linear, in the type of `x`.
        x: ``[..., K]``, its input before it is quantised.
        down_RK: A, ``[R, K]``, any float type.
        up_NR: B, ``[N, R]``, with the scales and strengths of the LoRAs in it.

    Returns:
        ``[..., N]`` in the type of `x`.

    Source: LoRA, section 4.1 (docs/sources.md).
    """
    return y + F.linear(F.linear(x, down_RK.to(x.dtype)), up_NR.to(x.dtype))
