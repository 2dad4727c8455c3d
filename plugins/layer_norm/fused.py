"""Layer norm as a kernel, which also quantises its output where a W8A8 linear follows."""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.block_quantiser.fused import FourBitMatrix, empty_four_bits
from wanforge.plugins.launching import Constant
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.quantiser import rows_together
from wanforge.plugins.quantiser.fused import Quantised, empty_quantised, empty_quantised_rows
from wanforge.plugins.row_moments.fused import KnownRows, check_moments

NORM = Kernel(
    "layer_norm",
    "norm",
    ("cdiv(M, 128)",),
    {"M": "i32", "x_stride": "i32:16", "eps": "fp32", "padding": "fp32"},
)
NORM_MEASURED = Kernel(
    "layer_norm",
    "norm_measured",
    ("cdiv(M, 128)", "max(cdiv(D, 128 * TILES), PROGRAMS // cdiv(M, 128))"),
    NORM.scalars,
)
NORM_ROWS = Kernel("layer_norm", "norm_rows", ("cdiv(M, ROWS)",), NORM.scalars)


class Affine(NamedTuple):
    """The gain and offset after the normalisation, and how the variance is computed."""

    gain_D: Tensor
    offset_D: Tensor
    eps: float
    modulated: bool
    padded_variance: bool


def norm(
    x_LD: Tensor, gain_D: Tensor, offset_D: Tensor, eps: float, *, modulated: bool, padded_variance: bool = False
) -> Tensor:
    """`reference.layer_norm`, or, if `modulated`, `reference.modulated_norm` of one sample, with its scale as the gain
    and its shift as the offset. Rows of x may be strided."""
    y_LD = torch.empty(x_LD.shape, dtype=x_LD.dtype, device=x_LD.device)
    _norm(NORM, x_LD, (y_LD, None), Affine(gain_D, offset_D, eps, modulated, padded_variance))
    return y_LD


def norm_quantised(x: KnownRows, affine: Affine) -> Quantised:
    """`norm`, quantised for the linear that follows. Rows are read once if their moments are known, otherwise twice."""
    check_moments(x)
    rows, width = x.x_LD.shape
    y = empty_quantised(rows, width, x.x_LD.device)
    if x.moments_2TL is None:
        _norm(NORM, x.x_LD, y, affine)
    else:
        _norm(NORM_MEASURED, x.x_LD, y, affine, moments=x.moments_2TL)
    return y


def norm_quantised_rows(x_LD: Tensor, affine: Affine, dtype: torch.dtype) -> Quantised:
    """`norm`, quantised by rows for the linear that follows."""
    rows, width = x_LD.shape
    y = empty_quantised_rows(rows, width, dtype, x_LD.device)
    _norm(NORM_ROWS, x_LD, y, affine, ROWS=rows_together(width))
    return y


def norm_four_bits(x_LD: Tensor, affine: Affine) -> FourBitMatrix:
    """`norm`, quantised to NVFP4 for the linear that follows."""
    rows, width = x_LD.shape
    y = empty_four_bits(rows, width, x_LD.device)
    _norm(NORM_ROWS, x_LD, y, affine, ROWS=rows_together(width))
    return y


def _norm(
    kernel: Kernel, x_LD: Tensor, y: tuple[Tensor, Tensor | None], affine: Affine, **others: Constant | Tensor
) -> None:
    rows, width = x_LD.shape
    if width % 128 or x_LD.stride(1) != 1 or not affine.gain_D.shape == affine.offset_D.shape == (width,):
        raise ShapeError(
            f"x {tuple(x_LD.shape)}, strides {x_LD.stride()}, gain {tuple(affine.gain_D.shape)} and offset "
            f"{tuple(affine.offset_D.shape)} do not fit; the width must be a multiple of 128"
        )
    padding = ((1 << (width - 1).bit_length()) - width) / width if affine.padded_variance else 0.0
    kernel(
        x=x_LD,
        y=y[0],
        y_scale=y[1],
        gain=affine.gain_D,
        offset=affine.offset_D,
        M=rows,
        x_stride=x_LD.stride(0),
        eps=affine.eps,
        padding=padding,
        D=width,
        MODULATED=affine.modulated,
        **others,
    )
