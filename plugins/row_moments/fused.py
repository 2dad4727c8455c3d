"""Moments of rows as a kernel, and hidden states whose moments may be known."""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.quantiser import TILE

MEASURE = Kernel("row_moments", "measure", ("cdiv(M, ROWS)", "D // 128"), {"M": "i32", "x_stride": "i32:16"})


class KnownRows(NamedTuple):
    """Hidden states ``[L, D]`` and their moments as in `reference.row_moments`; None where these are not known. Where
    rows are to be written, their moments are written as well if there is a tensor for them."""

    x_LD: Tensor
    moments_2TL: Tensor | None = None


def unmeasured(x_LD: Tensor) -> KnownRows:
    """Hidden states with memory for their moments."""
    return KnownRows(x_LD, _empty_moments(x_LD))


def _empty_moments(x_LD: Tensor) -> Tensor:
    rows, width = x_LD.shape
    return torch.empty(2, width // TILE, rows, dtype=torch.float32, device=x_LD.device)


def measured(x_LD: Tensor) -> KnownRows:
    """Hidden states with their moments; see `measure`."""
    moments_2TL = _empty_moments(x_LD)
    measure(x_LD, moments_2TL)
    return KnownRows(x_LD, moments_2TL)


def measure(x_LD: Tensor, moments_2TL: Tensor) -> None:
    """Write the moments of hidden states ``[L, D]`` to the memory for them, in one pass over the rows, which may be
    strided.

    Raises:
        ShapeError: The tensors do not fit each other or the kernel.
    """
    count, width = x_LD.shape
    if width % TILE or x_LD.stride(1) != 1:
        raise ShapeError(
            f"x {tuple(x_LD.shape)}, strides {x_LD.stride()}: rows must be contiguous, their width a multiple of {TILE}"
        )
    check_moments(KnownRows(x_LD, moments_2TL))
    MEASURE(x=x_LD, moments=moments_2TL, M=count, x_stride=x_LD.stride(0), D=width)


def check_moments(rows: KnownRows) -> None:
    """Refuse moments that cannot be those of their hidden states.

    Raises:
        ShapeError: They have another shape or type, or are not contiguous.
    """
    x_LD, moments_2TL = rows
    wanted = 2, x_LD.shape[1] // TILE, len(x_LD)
    if moments_2TL is None:
        return
    if moments_2TL.shape != wanted or moments_2TL.dtype != torch.float32 or not moments_2TL.is_contiguous():
        raise ShapeError(
            f"the moments of rows {tuple(x_LD.shape)} must be contiguous, {wanted} and float32; found "
            f"{tuple(moments_2TL.shape)} and {moments_2TL.dtype}"
        )
