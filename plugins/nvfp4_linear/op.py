"""The NVFP4 linear as the networks call it."""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from wanforge.errors import ShapeError
from wanforge.plugins.nvfp4_linear import BLOCK
from wanforge.plugins.nvfp4_linear.reference import nvfp4_linear as reference


def nvfp4_linear(x: Tensor, fp4_weight_NP: Tensor, scale_NB: Tensor, global_scale: Tensor, bias_N: Tensor) -> Tensor:
    """``x @ W.T + bias`` with 4-bit weights and `x` quantised on the fly; arguments as in `reference.nvfp4_linear`.

    Raises:
        ShapeError: K is not a multiple of 16, or the tensors do not fit each other.
    """
    outputs, inputs = fp4_weight_NP.shape[0], 2 * fp4_weight_NP.shape[1]
    if inputs % BLOCK:
        raise ShapeError(f"K is {inputs}; the NVFP4 linear needs a multiple of {BLOCK}: keep this layer unquantised")
    wanted = (inputs, (outputs, inputs // BLOCK), (), (outputs,))
    if (x.shape[-1], tuple(scale_NB.shape), tuple(global_scale.shape), tuple(bias_N.shape)) != wanted:
        raise ShapeError(
            f"x {tuple(x.shape)}, packed weight {tuple(fp4_weight_NP.shape)}, scale {tuple(scale_NB.shape)}, global "
            f"scale {tuple(global_scale.shape)} and bias {tuple(bias_N.shape)} do not fit"
        )
    if has_torch_function_unary(x):  # a tracer records the op as one node
        return handle_torch_function(nvfp4_linear, (x,), x, fp4_weight_NP, scale_NB, global_scale, bias_N)
    return reference(x, fp4_weight_NP, scale_NB, global_scale, bias_N)
