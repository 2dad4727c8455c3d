"""Quantising to NVFP4 as a kernel.

Inputs are on a GPU, on the CPU, where Triton's interpreter runs the same kernels, or on the meta device, where
launches are recorded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.nvfp4_linear import BLOCK
from wanforge.plugins.quantiser import TILE

QUANTISE = Kernel("block_quantiser", "quantise", ("cdiv(M, ROWS)", "K // 128"), {"M": "i32", "x_stride": "i32:16"})


class FourBitMatrix(NamedTuple):
    """A matrix ``[M, K]`` in NVFP4 with the global scale `INPUT_SCALE`: ``uint8 [M, K/2]``, two 4-bit floats in a byte,
    the first in its lower half, and the scales of their blocks ``float8_e4m3fn [M, K/16]``."""

    fp4_MP: Tensor
    scale_MB: Tensor


def empty_four_bits(rows: int, columns: int, device: torch.device) -> FourBitMatrix:
    """Allocate a matrix in NVFP4."""
    return FourBitMatrix(
        torch.empty(rows, columns // 2, dtype=torch.uint8, device=device),
        torch.empty(rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device=device),
    )


def quantise(x_MK: Tensor) -> FourBitMatrix:
    """`nvfp4_linear.reference.quantise_blocks` of a matrix whose rows may be strided; K must be a multiple of 128."""
    rows, columns = x_MK.shape
    if columns % TILE or x_MK.stride(1) != 1:
        raise ShapeError(
            f"x {tuple(x_MK.shape)}, strides {x_MK.stride()}: rows must be contiguous, their width a multiple of {TILE}"
        )
    y = empty_four_bits(rows, columns, x_MK.device)
    QUANTISE(x=x_MK, y=y.fp4_MP, y_scale=y.scale_MB, M=rows, x_stride=x_MK.stride(0), K=columns)
    return y
