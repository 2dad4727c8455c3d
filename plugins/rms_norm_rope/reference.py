"""The definitions of RMS norm over all heads at once and of the rotary embedding on adjacent channels."""

import torch
from torch import Tensor


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Each token divided by its root mean square across all heads, times a weight.

    Args:
        x_BLD: ``[..., D]``, any float type, before it is split into heads.
        weight_D: ``[D]``, any float type.

    Returns:
        ``[..., D]`` in the type of `x`, computed in float32 and rounded once.

    Source: Zhang & Sennrich 2019, eq. 4; roundings: TurboDiffusion, ops/core.py (docs/sources.md).
    """
    return (unit_rms(x_BLD, eps) * weight_D.float()).to(x_BLD.dtype)


def unit_rms(x_BLD: Tensor, eps: float) -> Tensor:
    """Each token divided by its root mean square, in float32."""
    x = x_BLD.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotate(x_BLHK: Tensor, cos_LP: Tensor, sin_LP: Tensor) -> Tensor:
    """Rotate each pair of adjacent channels by its token's angle.

    Args:
        x_BLHK: ``[B, L, H, K]``, any float type.
        cos_LP, sin_LP: Float32 ``[L, K/2]``, the same for every head.

    Returns:
        ``[B, L, H, K]`` in the type of `x`, computed in float32 and rounded once.

    Source: RoFormer (arXiv:2104.09864, 3.2); layout: TurboDiffusion, rcm/networks/wan2pt1.py
    (docs/sources.md).
    """
    even, odd = x_BLHK.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_LP[:, None], sin_LP[:, None]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return rotated.flatten(-2).to(x_BLHK.dtype)
