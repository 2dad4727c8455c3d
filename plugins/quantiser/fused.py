"""Quantisation as kernels.

Inputs are on a GPU, on the CPU, where Triton's interpreter runs the same kernels, or on the meta device, where
launches are recorded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.quantiser import TILE, rows_together

QUANTISE = Kernel("quantiser", "quantise", ("cdiv(M, 128)", "K // 128"), {"M": "i32", "x_stride": "i32:16"})
QUANTISE_ROWS = Kernel("quantiser", "quantise_rows", ("cdiv(M, ROWS)",), {"M": "i32", "x_stride": "i32:16"})


class Quantised(NamedTuple):
    """A matrix in steps of int8 with a scale per 128x128 tile, ``[ceil(M/128), K/128]``, or of int8 or e4m3 with one
    per row, ``[M]``; see `reference`."""

    steps_MK: Tensor
    scale: Tensor


def empty_quantised(rows: int, columns: int, device: torch.device) -> Quantised:
    """Allocate a matrix quantised by tiles."""
    tiles = (-(-rows // TILE), -(-columns // TILE))
    return Quantised(
        torch.empty(rows, columns, dtype=torch.int8, device=device),
        torch.empty(tiles, dtype=torch.float32, device=device),
    )


def empty_quantised_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Quantised:
    """Allocate a matrix quantised by rows."""
    return Quantised(
        torch.empty(rows, columns, dtype=dtype, device=device), torch.empty(rows, dtype=torch.float32, device=device)
    )


def quantise(x_MK: Tensor) -> Quantised:
    """`reference.quantise_tiles` of a matrix whose rows may be strided; K must be a multiple of 128."""
    rows, columns = x_MK.shape
    _check_rows(x_MK)
    y = empty_quantised(rows, columns, x_MK.device)
    QUANTISE(x=x_MK, y=y.steps_MK, y_scale=y.scale, M=rows, x_stride=x_MK.stride(0), K=columns)
    return y


def quantise_rows(x_MK: Tensor, dtype: torch.dtype = torch.int8) -> Quantised:
    """`reference.quantise_rows` of a matrix whose rows may be strided; K must be a multiple of 128."""
    return quantised_rows(QUANTISE_ROWS, x_MK, dtype)


def quantised_rows(kernel: Kernel, x_MK: Tensor, dtype: torch.dtype) -> Quantised:
    """The result of a kernel with the parameters of `QUANTISE_ROWS`."""
    rows, columns = x_MK.shape
    _check_rows(x_MK)
    y = empty_quantised_rows(rows, columns, dtype, x_MK.device)
    together = rows_together(columns)
    kernel(x=x_MK, y=y.steps_MK, y_scale=y.scale, M=rows, x_stride=x_MK.stride(0), K=columns, ROWS=together)
    return y


def _check_rows(x_MK: Tensor) -> None:
    if x_MK.shape[1] % TILE or x_MK.stride(1) != 1:
        raise ShapeError(
            f"x {tuple(x_MK.shape)}, strides {x_MK.stride()}: rows must be contiguous, their width a multiple of {TILE}"
        )
