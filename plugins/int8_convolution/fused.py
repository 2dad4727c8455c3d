"""The convolution in int8 as a kernel. Frames lie with their channels last.

Letters: T frames, P frames of the past, H W rows and columns, I and O channels in and out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.channel_norm import PAST
from wanforge.plugins.int8_convolution import TAPS
from wanforge.plugins.launching.call import Kernel

CONVOLVE = Kernel(
    "int8_convolution",
    "convolve",
    ("cdiv(N, ROWS // FRAMES) * cdiv(OUTPUTS, PARTS * PART) * T // FRAMES",),
    {"T": "i32", "H": "i32", "W": "i32", "N": "i32"},
)
MOST_VALUES = 2**31 - 1
"""The most values of the frames that a program reads, and of one that it writes: their places are in 32 bits."""
FEW_OUTPUTS, PART, PARTS = 16, 32, 3
"""The outputs that are multiplied at a time where there are few, those elsewhere, and how many times a program has
them."""


class ConvolutionWeight(NamedTuple):
    """A convolution's weight ``int8 [O, 27 * I]``, whose taps follow one another, its scale and its bias, which are
    ``float32 [O]``."""

    steps_OK: Tensor
    scale_O: Tensor
    bias_O: Tensor


def taps_last(int8_weight_OITHW: Tensor) -> Tensor:
    """A weight as the kernel reads it."""
    return int8_weight_OITHW.permute(0, 2, 3, 4, 1).reshape(len(int8_weight_OITHW), -1).contiguous()


def convolve(
    x_THWI: Tensor, weight: ConvolutionWeight, dtype: torch.dtype, residual_THWO: Tensor | None = None, around: int = 1
) -> Tensor:
    """A causal convolution, whose input begins with the frames of the past, and the residual if there is one.

    Args:
        x_THWI: ``int8 [P + T, H, W, I]``.
        dtype: The type of the result, to which it is rounded before the residual is added.
        residual_THWO: In that type.
        around: The number of rows of zeros above and below.

    Returns:
        ``[T, H + 2 * around - 2, W, O]``.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    frames, height, width, inputs = x_THWI.shape
    outputs = len(weight.scale_O)
    shape = (frames - PAST, height + 2 * around - 2, width, outputs)
    y_THWO = torch.empty(shape, dtype=dtype, device=x_THWI.device)
    fits = residual_THWO is None or (residual_THWO.shape == shape and residual_THWO.dtype == dtype)
    if weight.steps_OK.shape != (outputs, TAPS * inputs) or weight.bias_O.shape != (outputs,) or not fits:
        found = "none" if residual_THWO is None else f"{tuple(residual_THWO.shape)} of {residual_THWO.dtype}"
        raise ShapeError(
            f"weight {tuple(weight.steps_OK.shape)}, bias {tuple(weight.bias_O.shape)} and residual {found} do not fit "
            f"x {tuple(x_THWI.shape)} and {outputs} outputs of {dtype}"
        )
    given = [x_THWI, *weight, residual_THWO]
    if any(x is not None and not x.is_contiguous() for x in given) or x_THWI.dtype != torch.int8:
        raise ShapeError(f"x must be int8, not {x_THWI.dtype}, and all tensors contiguous")
    together = 2 - shape[0] % 2
    if max((PAST + together) * height * inputs, shape[1] * outputs) * width > MOST_VALUES:
        raise ShapeError(f"frames of {width}x{height} with {inputs} channels are too large to be convolved in int8")
    part, parts = cut(outputs)
    CONVOLVE(
        x=x_THWI,
        weight=weight.steps_OK,
        scale=weight.scale_O,
        bias=weight.bias_O,
        residual=residual_THWO,
        y=y_THWO,
        T=shape[0],
        H=height,
        W=width,
        N=shape[1] * width,
        C=inputs,
        OUTPUTS=outputs,
        AROUND=around,
        FRAMES=together,
        PART=part,
        PARTS=parts,
    )
    return y_THWO


def cut(outputs: int) -> tuple[int, int]:
    """How many outputs are multiplied at a time, and how many times so many a program has. Multiples of 96, which the
    published widths are, leave nothing over."""
    part = FEW_OUTPUTS if outputs <= FEW_OUTPUTS else PART
    return part, min(PARTS, -(-outputs // part))
