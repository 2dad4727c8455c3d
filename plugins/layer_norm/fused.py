"""Layer norm as a kernel, which also quantises its output where a W8A8 linear follows."""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.quantiser.fused import Quantised, empty_quantised

NORM = Kernel(
    "layer_norm",
    "norm",
    ("cdiv(M, 128)",),
    {"M": "i32", "x_stride": "i32:16", "eps": "fp32", "padding": "fp32"},
)


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
    _norm(x_LD, y_LD, None, Affine(gain_D, offset_D, eps, modulated, padded_variance))
    return y_LD


def norm_quantised(
    x_LD: Tensor, gain_D: Tensor, offset_D: Tensor, eps: float, *, modulated: bool, padded_variance: bool = False
) -> Quantised:
    """`norm`, quantised for the linear that follows."""
    y = empty_quantised(x_LD.shape[0], x_LD.shape[1], x_LD.device)
    _norm(x_LD, y.steps_MK, y.scale, Affine(gain_D, offset_D, eps, modulated, padded_variance))
    return y


def _norm(x_LD: Tensor, y_LD: Tensor, y_scale: Tensor | None, affine: Affine) -> None:
    rows, width = x_LD.shape
    if width % 128 or x_LD.stride(1) != 1 or not affine.gain_D.shape == affine.offset_D.shape == (width,):
        raise ShapeError(
            f"x {tuple(x_LD.shape)}, strides {x_LD.stride()}, gain {tuple(affine.gain_D.shape)} and offset "
            f"{tuple(affine.offset_D.shape)} do not fit; the width must be a multiple of 128"
        )
    padding = ((1 << (width - 1).bit_length()) - width) / width if affine.padded_variance else 0.0
    NORM(
        x=x_LD,
        y=y_LD,
        y_scale=y_scale,
        gain=affine.gain_D,
        offset=affine.offset_D,
        M=rows,
        x_stride=x_LD.stride(0),
        eps=affine.eps,
        padding=padding,
        D=width,
        MODULATED=affine.modulated,
    )
