"""The convolution in int8 as the networks call it."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from wanforge.errors import ShapeError
from wanforge.plugins.int8_convolution import WIDTH, reference


def channel_steps(x_BITHW: Tensor, gain_I: Tensor) -> Tensor:
    """The input of `int8_convolution`, as `reference.channel_steps` rounds it."""
    if has_torch_function_unary(x_BITHW):  # a tracer records the op as one node
        return handle_torch_function(channel_steps, (x_BITHW,), x_BITHW, gain_I)
    return reference.channel_steps(x_BITHW, gain_I)


def int8_convolution(steps_BITHW: Tensor, int8_weight_OITHW: Tensor, scale_O: Tensor, bias_O: Tensor) -> Tensor:
    """A causal 3x3x3 convolution of whole numbers; arguments and result as in `reference.int8_convolution`.

    Raises:
        ShapeError: The tensors do not fit each other, or are not int8.
    """
    outputs, inputs, *taps = int8_weight_OITHW.shape
    fits = (steps_BITHW.shape[1], tuple(scale_O.shape), tuple(bias_O.shape)) == (inputs, (outputs,), (outputs,))
    if not fits or tuple(taps) != 3 * (WIDTH,) or {steps_BITHW.dtype, int8_weight_OITHW.dtype} != {torch.int8}:
        raise ShapeError(
            f"steps {tuple(steps_BITHW.shape)} of {steps_BITHW.dtype}, weight {tuple(int8_weight_OITHW.shape)} of "
            f"{int8_weight_OITHW.dtype}, scale {tuple(scale_O.shape)} and bias {tuple(bias_O.shape)} do not fit; "
            "expected int8 [B, I, T, H, W], int8 [O, I, 3, 3, 3], [O] and [O]"
        )
    if has_torch_function_unary(steps_BITHW):  # a tracer records the op as one node
        return handle_torch_function(int8_convolution, (steps_BITHW,), steps_BITHW, int8_weight_OITHW, scale_O, bias_O)
    return reference.int8_convolution(steps_BITHW, int8_weight_OITHW, scale_O, bias_O)
