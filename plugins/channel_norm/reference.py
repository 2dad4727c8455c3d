"""The definitions of what the VAE computes between two convolutions."""

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0))
"""Which of three taps add up to each of the two taps of `folded_weight`, for even and for odd rows of the result."""


def channel_norm(x_BC: Tensor, weight_C: Tensor) -> Tensor:
    """The channels of each position divided by their L2 norm, times sqrt(C) and a weight.

    Args:
        x_BC: ``[B, C, ...]``, any float type.
        weight_C: As many channels, with as many axes of length one after them as x has.

    Returns:
        The same shape and type; computed in float32 and rounded once.

    Source: Wan2.1, wan/modules/vae.py, RMS_norm (docs/sources.md).
    """
    unit = F.normalize(x_BC.float(), dim=1)
    return (unit * weight_C.shape[0] ** 0.5 * weight_C.float()).to(x_BC.dtype)


def double(x_NCHW: Tensor) -> Tensor:
    """Repeat every pixel four times: nearest-neighbour upsampling without Resize, which TensorRT lacks in bfloat16."""
    wide = torch.stack((x_NCHW, x_NCHW), -1).flatten(-2)
    return torch.stack((wide, wide), -2).flatten(-3, -2)


def folded_weight(weight_OIHW: Tensor) -> Tensor:
    """The weight of a 2x2 convolution of single pixels that does what a 3x3 convolution does with doubled pixels.

    Of the three rows of doubled pixels that a row of the result reads, two are the same, so their taps are added; which
    two depends on whether the row is even or odd. The same goes for columns. So four results for each pixel, in as many
    channels, take 16 products instead of 36.

    Args:
        weight_OIHW: ``[O, I, 3, 3]``.

    Returns:
        ``[4 * O, I, 2, 2]``, for a convolution of padding 1: first the O channels of even rows and even columns, then
        those of even rows and odd columns, and so on.
    """
    rows = weight_OIHW.new_tensor(ROWS)
    return torch.einsum("ahr,bws,oirs->aboihw", rows, rows, weight_OIHW).flatten(0, 2)


def unfolded(y_NCHW: Tensor) -> Tensor:
    """What a convolution with a `folded_weight` computes, as one picture.

    Args:
        y_NCHW: ``[N, 4 * C, H + 1, W + 1]``, the result of the 2x2 convolution with padding 1.

    Returns:
        ``[N, C, 2 * H, 2 * W]``.
    """
    height, width = y_NCHW.shape[2] - 1, y_NCHW.shape[3] - 1
    y_NQCHW = y_NCHW.unflatten(1, (4, -1))
    even, odd = (
        torch.stack([y_NQCHW[:, 2 * a + b, :, a : a + height, b : b + width] for b in (0, 1)], -1).flatten(-2)
        for a in (0, 1)
    )
    return torch.stack((even, odd), -2).flatten(-3, -2)
