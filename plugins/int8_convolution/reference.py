"""The definition of a causal convolution in int8, and of how its input and its weight become whole numbers.

A channel of the input has one step for all positions, which follows from the gain of the norm before it and is known
before anything is computed. The weight is multiplied by the steps of its input channels, so that the sums of an output
have one scale.

Letters: B clips, I and O channels in and out, T frames, H W rows and columns.
"""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from wanforge.plugins.int8_convolution import FULL_SCALE, LEAST_REACH, REACH, WIDTH


def steps_per_unit(gain_I: Tensor) -> Tensor:
    """How many steps a difference of one is in each channel behind a norm with this gain.

    Args:
        gain_I: Any shape and any float type.

    Returns:
        The same shape in float32.
    """
    reach = (gain_I.float().abs() * REACH).clamp_min(LEAST_REACH)
    # PyTorch divides a number by a tensor by multiplying with the reciprocal, which rounds twice.
    return torch.full_like(reach, FULL_SCALE) / reach


def channel_steps(x_BITHW: Tensor, gain_I: Tensor) -> Tensor:
    """Round the input of a convolution to steps.

    Args:
        x_BITHW: What comes out of the norm and of SiLU, in any float type.
        gain_I: The gain of the norm, as many channels with as many axes of length one after them as x has.

    Returns:
        int8 of the same shape, from -127 to 127. Halves round to even.
    """
    steps = x_BITHW.float() * steps_per_unit(gain_I)
    return steps.round().clamp(-FULL_SCALE, FULL_SCALE).to(torch.int8)


def quantise_weight(weight_OITHW: Tensor, gain_I: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight symmetrically, with one scale per output.

    Args:
        weight_OITHW: ``[O, I, 3, 3, 3]``, any float type.
        gain_I: The gain of the norm before the convolution, any shape with I values.

    Returns:
        ``int8 [O, I, 3, 3, 3]``, and ``float32 [O]``, by which sums of products with steps of the input are multiplied.
    """
    scaled = weight_OITHW.float() / steps_per_unit(gain_I).reshape(-1, 1, 1, 1)
    amax_O = scaled.abs().amax((1, 2, 3, 4))
    scale_O = torch.where(amax_O > 0, amax_O, 1.0) / torch.full_like(amax_O, FULL_SCALE)
    return (scaled / scale_O[:, None, None, None, None]).round().to(torch.int8), scale_O


def sums(steps_BITHW: Tensor, int8_weight_OITHW: Tensor) -> Tensor:
    """The sums of a convolution whose rows and columns are padded with zeros, exactly: ``int32 [B, O, T - 2, H, W]``.

    A tap is multiplied in float32, in which its sums are exact: they are below 2^24 for up to 1,040 channels.
    """
    _, _, frames, height, width = steps_BITHW.shape
    padded = F.pad(steps_BITHW, (1, 1, 1, 1))
    total = torch.zeros((), dtype=torch.int32, device=steps_BITHW.device)
    for t, h, w in product(range(WIDTH), repeat=3):
        seen = padded[:, :, t : t + frames - 2, h : h + height, w : w + width]
        tap = int8_weight_OITHW[:, :, t : t + 1, h : h + 1, w : w + 1]
        total = total + F.conv3d(seen.float(), tap.float()).to(torch.int32)
    return total


def int8_convolution(steps_BITHW: Tensor, int8_weight_OITHW: Tensor, scale_O: Tensor, bias_O: Tensor) -> Tensor:
    """A causal 3x3x3 convolution in int8.

    Args:
        steps_BITHW: int8, as from `channel_steps`; the first two frames are the past.
        int8_weight_OITHW, scale_O: As from `quantise_weight`.
        bias_O: ``[O]``, any float type.

    Returns:
        ``float32 [B, O, T - 2, H, W]``: the sums, rounded to float32, times the scale, plus the bias.
    """
    scale, bias = (each.float()[:, None, None, None] for each in (scale_O, bias_O))
    return sums(steps_BITHW, int8_weight_OITHW).float() * scale + bias
