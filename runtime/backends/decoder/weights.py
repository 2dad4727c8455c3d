"""The decoder's weights as its convolutions take them: in the compute type, with channels last, folded where pixels are
doubled."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wanforge.plugins.channel_norm.reference import folded_weight
from wanforge.plugins.int8_convolution.fused import taps_last
from wanforge.plugins.int8_convolution.reference import steps_per_unit
from wanforge.runtime.reference.vae import latent_statistics

DOUBLING = "resample.1"
"""The convolution of an upsampler that sees doubled pixels."""
MEAN, STD = "latent_mean", "latent_std"
INT8 = ".int8_weight"
GAIN, STEPS = ".gamma", ".steps"
"""How the names of the gains of norms end, and of the numbers that `int8_convolution.reference.steps_per_unit` makes of
them."""


def laid_out(stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the decoder's tensors, by the same names, the `STEPS` of its norms, and the latents' `MEAN` and `STD`,
    ``[16]``.

    Args:
        stored: The tensors of the graph, in any float type.
        dtype: The compute type. Weights of norms are in float32, as the reference multiplies by them.
    """
    found = {name: _laid_out(name, tensor, _type_of(name, stored, dtype)) for name, tensor in stored.items()}
    steps = {name.replace(GAIN, STEPS): steps_per_unit(found[name]) for name in stored if name.endswith(GAIN)}
    mean, std = latent_statistics(torch.empty(0, dtype=dtype, device=next(iter(stored.values())).device))
    return {**found, **steps, MEAN: mean.flatten(), STD: std.flatten()}


def _type_of(name: str, stored: Mapping[str, Tensor], dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor beside the weight of a convolution in int8 is float32, as what it is added to."""
    return torch.float32 if name.rpartition(".")[0] + INT8 in stored else dtype


def _laid_out(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if name.endswith(INT8):
        return taps_last(tensor)
    if name.endswith(GAIN):
        return tensor.to(torch.float32, copy=True).flatten()
    if name.endswith(f"{DOUBLING}.weight"):
        return folded_weight(tensor.float()).to(dtype, memory_format=torch.channels_last)
    if name.endswith(f"{DOUBLING}.bias"):
        return tensor.to(dtype).repeat(4)
    if name.endswith((".bias", ".scale")):
        return tensor.to(dtype, copy=True)
    if all(size == 1 for size in tensor.shape[2:]):
        return tensor.to(dtype, copy=True).flatten(1)
    return tensor.to(dtype, copy=True, memory_format=torch.channels_last_3d)
