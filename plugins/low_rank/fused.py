"""The product of low rank beside a linear as a library multiplies it, between launches of kernels.

The library adds the linear's output to the second product before it rounds, so that there is no launch for the sum.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import library


class Factors(NamedTuple):
    """``[R, K]`` and ``[N, R]``, any float type."""

    down_RK: Tensor
    up_NR: Tensor


def add_low_rank(y_MN: Tensor, x_MK: Tensor, factors: Factors, gate_N: Tensor | None = None) -> None:
    """Add ``(x @ A.T) @ B.T * gate`` to `y` in place, see `reference.add_low_rank`; without a gate, the product itself.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    down_RK, up_NR = factors
    (rank, inputs), (outputs, inner) = down_RK.shape, up_NR.shape
    if rank != inner or x_MK.shape[1] != inputs or y_MN.shape != (len(x_MK), outputs):
        raise ShapeError(
            f"factors {tuple(down_RK.shape)} and {tuple(up_NR.shape)} do not fit x {tuple(x_MK.shape)} and "
            f"y {tuple(y_MN.shape)}"
        )
    library(multiply, y_MN, x_MK, down_RK, up_NR, *([] if gate_N is None else [gate_N]))


def multiply(y_MN: Tensor, x_MK: Tensor, down_RK: Tensor, up_NR: Tensor, gate_N: Tensor | None = None) -> Tensor:
    """Both products and the sum, in the type of `x`. A gate is multiplied into the upper factor, which is small."""
    up_NR = up_NR if gate_N is None else up_NR * gate_N[:, None]
    inner_MR = torch.mm(x_MK, down_RK.to(x_MK.dtype).T)
    y_MN.addmm_(inner_MR, up_NR.to(x_MK.dtype).T)
    return y_MN.new_empty(0)
