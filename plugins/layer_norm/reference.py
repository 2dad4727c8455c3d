"""The definition of layer norm as TurboDiffusion computes it: in float32, with one rounding at the end."""

import torch
from torch import Tensor
from torch.nn import functional as F


def normalise(x_BLD: Tensor, eps: float, *, padded_variance: bool = False) -> Tensor:
    """Each token minus its mean, divided by its standard deviation, in float32.

    Args:
        x_BLD: ``[..., D]``, any float type.
        eps: Added to the variance.
        padded_variance: Reproduce the fault of upstream's FastLayerNorm, which pads D to P, the next power of two, and
            counts the padding's distance from the mean: variance + (P - D) / D * mean^2. Needed only to match
            upstream's pictures bit for bit. Source: TurboDiffusion, ops/core.py (docs/sources.md).
    """
    x, width = x_BLD.float(), x_BLD.shape[-1]
    if not padded_variance:
        return F.layer_norm(x, (width,), eps=eps)
    padding = (1 << (width - 1).bit_length()) - width
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True) + padding / width * mean.square()
    return (x - mean) * torch.rsqrt(variance + eps)


def layer_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, *, padded_variance: bool = False) -> Tensor:
    """Layer norm with weights, rounded once to the type of `x`."""
    y_BLD = normalise(x_BLD, eps, padded_variance=padded_variance) * weight_D.float() + bias_D.float()
    return y_BLD.to(x_BLD.dtype)


def modulated_norm(
    x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, *, padded_variance: bool = False
) -> Tensor:
    """Layer norm without weights, then ``n * (1 + scale) + shift`` per sample.

    Args:
        x_BLD: Hidden states ``[B, L, D]``, any float type.
        shift_BD, scale_BD: Float32 ``[B, D]``.

    Returns:
        ``[B, L, D]`` in the type of `x`. The normalised value is rounded to that type before it is modulated in
        float32, as upstream does.

    Source: adaLN-Zero (arXiv:2212.09748, 3.2); roundings: TurboDiffusion, rcm/networks/wan2pt1.py
    (docs/sources.md).
    """
    n_BLD = normalise(x_BLD, eps, padded_variance=padded_variance).to(x_BLD.dtype)
    return (n_BLD.float() * (1 + scale_BD[:, None]) + shift_BD[:, None]).to(x_BLD.dtype)
