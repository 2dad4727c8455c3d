"""The definition of NVFP4 and of the linear that multiplies in it.

A number is a 4-bit float (e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), times the scale of its block of 16
neighbours in a row, which is an 8-bit float (e4m3), times the global scale of the whole tensor.

Source: ModelOpt, torch/quantization/qtensor/nvfp4_tensor.py (docs/sources.md).
"""

import torch
from torch import Tensor

from wanforge.plugins.nvfp4_linear import BLOCK, INPUT_SCALE, LARGEST, LARGEST_SCALE

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three of a number's four bits stand for; the highest is the sign."""


def nvfp4_linear(x: Tensor, fp4_weight_NP: Tensor, scale_NB: Tensor, global_scale: Tensor, bias_N: Tensor) -> Tensor:
    """``x @ W.T + bias`` with `x` quantised on the fly.

    The 4-bit floats with the scales of their blocks are multiplied and summed in float32, in any order. The sum takes
    the global scales and is rounded to the type of `x`, and again after the bias is added.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16, K a multiple of 16.
        fp4_weight_NP: ``uint8 [N, K/2]``, two numbers in a byte, the first in its lower half.
        scale_NB: ``float8_e4m3fn [N, K/16]``.
        global_scale: float32, without dimensions.
        bias_N: ``[N]``, any float type.

    Returns:
        ``[..., N]`` in the type of `x`.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    sums_MN = in_blocks(*quantise_blocks(x_MK, x.new_full((), INPUT_SCALE, dtype=torch.float32))) @ (
        in_blocks(unpack(fp4_weight_NP), scale_NB).T
    )
    y_MN = (sums_MN * (global_scale * INPUT_SCALE)).to(x.dtype) + bias_N.to(x.dtype)
    return y_MN.unflatten(0, x.shape[:-1])


def quantise_weight(weight_NK: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows of a weight whose global scale is known: the packed numbers ``uint8 [N, K/2]`` and the scales of
    their blocks ``float8_e4m3fn [N, K/16]``."""
    values_NK, scale_NB = quantise_blocks(weight_NK, global_scale)
    return pack(values_NK), scale_NB


def global_scale_of(amax: Tensor) -> Tensor:
    """The global scale of a tensor with this largest magnitude, with which the largest of its blocks has the largest
    scale that there is: float32, one if the tensor is zero."""
    scale = amax.float() / torch.full_like(amax, LARGEST * LARGEST_SCALE, dtype=torch.float32)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantise_blocks(x_RC: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix, with one scale per block. The scale is the largest magnitude divided by 6 and by the global
    scale, rounded to e4m3, at most 448. Numbers are rounded to the nearest, halves to even, and are at most 6. A block
    whose scale would be zero has the scale one, with which its numbers are zeros.

    Args:
        x_RC: ``[R, C]``, any float type, C a multiple of 16; the arithmetic is in float32.

    Returns:
        The 4-bit floats as float32 ``[R, C]``, and the scales ``float8_e4m3fn [R, C/16]``.
    """
    blocks = x_RC.float().unflatten(1, (-1, BLOCK))
    amax = blocks.abs().amax(2)
    ratio = amax / (global_scale * LARGEST)
    scale_RB = ratio.clamp_max(LARGEST_SCALE).to(torch.float8_e4m3fn)
    scale_RB = torch.where(scale_RB.float() == 0, 1.0, scale_RB.float()).to(torch.float8_e4m3fn)
    return rounded(blocks / (scale_RB.float() * global_scale)[:, :, None]).flatten(1), scale_RB


def rounded(x: Tensor) -> Tensor:
    """The nearest 4-bit floats; halves go to the neighbour whose last bit is zero, and 6 is the largest magnitude."""
    magnitude = x.abs().clamp_max(LARGEST)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def in_blocks(values_RC: Tensor, scale_RB: Tensor) -> Tensor:
    """Numbers times the scales of their blocks, float32 ``[R, C]``. Six bits hold each of them."""
    return values_RC * scale_RB.float().repeat_interleave(BLOCK, 1)


def dequantise(fp4_weight_NP: Tensor, scale_NB: Tensor, global_scale: Tensor) -> Tensor:
    """The values that a quantised weight represents, float32 ``[N, K]``."""
    return in_blocks(unpack(fp4_weight_NP), scale_NB) * global_scale


def pack(values_RC: Tensor) -> Tensor:
    """4-bit floats as bytes, ``uint8 [R, C/2]``: the sign in the highest of four bits, the first number of two in the
    lower half of the byte."""
    codes = torch.bucketize(values_RC.abs(), values_RC.new_tensor(MAGNITUDES)) + 8 * torch.signbit(values_RC)
    pairs = codes.to(torch.uint8).unflatten(1, (-1, 2))
    return pairs[:, :, 0] | pairs[:, :, 1] << 4


def unpack(packed_RP: Tensor) -> Tensor:
    """The 4-bit floats in some bytes, as float32 ``[R, C]``."""
    codes = torch.stack([packed_RP & 15, packed_RP >> 4], 2).flatten(1).int()
    values = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)], device=packed_RP.device)
    return values[codes]
