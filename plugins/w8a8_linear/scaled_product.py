"""The W8A8 linear with scales by row as PyTorch's library multiplies it, for steps of e4m3.

On a GPU it is `torch._scaled_mm` in bfloat16, the only type that it writes on every GPU. Elsewhere, and in other types,
the definition multiplies.
"""

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import Kernel, library, library_into
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.fused import QUANTISE_ROWS, Quantised, quantised_rows
from wanforge.plugins.w8a8_linear.fused import Weight
from wanforge.plugins.w8a8_linear.reference import multiply_rows

GELU_QUANTISE_ROWS = Kernel("w8a8_linear", "gelu_quantise_rows", QUANTISE_ROWS.grid, QUANTISE_ROWS.scalars)


def scaled_linear(x: Quantised, weight: Weight) -> Tensor:
    """``x @ W.T + bias`` of a matrix and a weight that are quantised by rows to e4m3: ``[M, N]`` in the bias's type.

    Raises:
        ShapeError: They do not fit each other, or N or K is not a multiple of 128.
    """
    _check(x, weight)
    return library(multiply, *x, *weight)


def scaled_linear_into(out_MN: Tensor, x: Quantised, weight: Weight) -> None:
    """Write `scaled_linear` to a tensor."""
    _check(x, weight)
    library_into(out_MN, multiply, *x, *weight)


def _check(x: Quantised, weight: Weight) -> None:
    outputs, inputs = weight.steps_NK.shape
    if inputs != x.steps_MK.shape[1] or inputs % TILE or outputs % TILE:
        raise ShapeError(
            f"weight {tuple(weight.steps_NK.shape)} does not fit x {tuple(x.steps_MK.shape)}; K must be the same, "
            f"and N and K multiples of {TILE}"
        )


def scaled_linear_gelu(x: Quantised, weight: Weight) -> Quantised:
    """``gelu(x @ W.T + bias)``, quantised for the linear that follows in the launch that computes GELU."""
    return quantised_rows(GELU_QUANTISE_ROWS, scaled_linear(x, weight), x.steps_MK.dtype)


def multiply(x_MK: Tensor, x_scale_M: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor) -> Tensor:
    """The product, its scales and its bias. The library adds the bias before it rounds. On Hopper it adds up in the
    tensor cores' own precision, of about 14 bits, which is faster and far more exact than the steps."""
    if x_MK.device.type == "cuda" and bias_N.dtype == torch.bfloat16:
        return torch._scaled_mm(
            x_MK,
            weight_NK.T,
            scale_a=x_scale_M[:, None],
            scale_b=scale_N[None],
            bias=bias_N,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return multiply_rows(x_MK, x_scale_M, weight_NK, scale_N).to(bias_N.dtype) + bias_N
