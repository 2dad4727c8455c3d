"""The decoder's weights as its convolutions take them: in the compute type, with channels last, folded where pixels are
doubled."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wanforge.plugins.channel_norm.reference import folded_weight
from wanforge.runtime.reference.vae import latent_statistics

DOUBLING = "resample.1"
"""The convolution of an upsampler that sees doubled pixels."""
MEAN, STD = "latent_mean", "latent_std"


def laid_out(stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the decoder's tensors, by the same names, and the latents' `MEAN` and `STD`, ``[16]``.

    Args:
        stored: The tensors of the graph, in any float type.
        dtype: The compute type. Weights of norms are in float32, as the reference multiplies by them.
    """
    found = {name: _laid_out(name, tensor, dtype) for name, tensor in stored.items()}
    mean, std = latent_statistics(torch.empty(0, dtype=dtype, device=next(iter(stored.values())).device))
    return {**found, MEAN: mean.flatten(), STD: std.flatten()}


def _laid_out(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if name.endswith(".gamma"):
        return tensor.to(torch.float32, copy=True).flatten()
    if name.endswith(f"{DOUBLING}.weight"):
        return folded_weight(tensor.float()).to(dtype, memory_format=torch.channels_last)
    if name.endswith(f"{DOUBLING}.bias"):
        return tensor.to(dtype).repeat(4)
    if name.endswith(".bias"):
        return tensor.to(dtype, copy=True)
    if all(size == 1 for size in tensor.shape[2:]):
        return tensor.to(dtype, copy=True).flatten(1)
    return tensor.to(dtype, copy=True, memory_format=torch.channels_last_3d)
