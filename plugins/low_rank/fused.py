"""The product of low rank beside a linear as a library multiplies it, between launches of kernels.

The library adds the linear's output to the second product before it rounds, so that there is no launch for the sum.
"""

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import library


def add_low_rank(y_MN: Tensor, x_MK: Tensor, down_RK: Tensor, up_NR: Tensor) -> Tensor:
    """``y + (x @ A.T) @ B.T``, see `reference.add_low_rank`, whose sum is rounded once more.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    (rank, inputs), (outputs, inner) = down_RK.shape, up_NR.shape
    if rank != inner or x_MK.shape[1] != inputs or y_MN.shape != (len(x_MK), outputs):
        raise ShapeError(
            f"factors {tuple(down_RK.shape)} and {tuple(up_NR.shape)} do not fit x {tuple(x_MK.shape)} and "
            f"y {tuple(y_MN.shape)}"
        )
    return library(multiply, y_MN, x_MK, down_RK, up_NR)


def multiply(y_MN: Tensor, x_MK: Tensor, down_RK: Tensor, up_NR: Tensor) -> Tensor:
    """Both products and the sum, in the type of `x`."""
    inner_MR = torch.mm(x_MK, down_RK.to(x_MK.dtype).T)
    return torch.addmm(y_MN, inner_MR, up_NR.to(x_MK.dtype).T)
