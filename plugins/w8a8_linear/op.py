"""The W8A8 linear as the networks call it."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from wanforge.errors import ShapeError
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.reference import TILES
from wanforge.plugins.w8a8_linear.reference import w8a8_linear as reference


def w8a8_linear(x: Tensor, weight_NK: Tensor, scale: Tensor, bias_N: Tensor) -> Tensor:
    """``x @ W.T + bias`` with 8-bit weights and `x` quantised on the fly; arguments as in `reference.w8a8_linear`.

    Raises:
        ShapeError: K is not a multiple of 128, or the tensors do not fit each other.
    """
    outputs, inputs = weight_NK.shape
    if inputs % TILE:
        raise ShapeError(f"K is {inputs}; the W8A8 linear needs a multiple of {TILE}: keep this layer unquantised")
    tiles = [tile for tile in TILES if inputs % tile == 0 and weight_NK.dtype == torch.int8]
    scales = ((outputs,), *((-(-outputs // tile), inputs // tile) for tile in tiles))
    if x.shape[-1] != inputs or scale.shape not in scales or bias_N.shape != (outputs,):
        raise ShapeError(
            f"x {tuple(x.shape)}, weight {tuple(weight_NK.shape)}, scale {tuple(scale.shape)} and "
            f"bias {tuple(bias_N.shape)} do not fit"
        )
    if has_torch_function_unary(x):  # a tracer records the op as one node
        return handle_torch_function(w8a8_linear, (x,), x, weight_NK, scale, bias_N)
    return reference(x, weight_NK, scale, bias_N)
