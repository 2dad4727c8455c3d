"""What each half of the VAE keeps of a chunk for the next one, told without running it.

Running it on the meta device would tell the same, but takes PyTorch's compiler to be imported, which is two seconds of
every process that makes a clip.
"""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from torch import nn

from wanforge.configs.clip import SPATIAL_STRIDE
from wanforge.plugins.channel_norm import PAST
from wanforge.runtime.reference.vae import Conv, Decoder, Downsample, Encoder, Int8Conv, Residual, Upsample


class KeptFrames(NamedTuple):
    """A cache: its channels and frames, by how much its rows and columns are those of the latent, and whether it holds
    the steps of a convolution in int8."""

    channels: int
    frames: int
    scale: int
    is_int8: bool = False


def kept(half: Encoder | Decoder) -> Iterator[KeptFrames]:
    """The caches of a half, in the order in which `First` and `Next` keep them."""
    scale = 1 if isinstance(half, Decoder) else SPATIAL_STRIDE
    yield _past_of(half.conv1, scale)
    layers = chain(half.middle, half.upsamples) if isinstance(half, Decoder) else chain(half.downsamples, half.middle)
    for layer in layers:
        match layer:
            case Residual():
                yield from (_past_of(layer.residual[name], scale) for name in ("2", "6"))
            case Downsample():
                scale //= 2
                if layer.time_conv is not None:
                    yield KeptFrames(layer.time_conv.weight.shape[1], 1, scale)
            case Upsample():
                if layer.time_conv is not None:
                    yield KeptFrames(layer.time_conv.weight.shape[1], PAST, scale)
                scale *= 2
    yield _past_of(half.head["2"], scale)


def _past_of(convolution: nn.Module, scale: int) -> KeptFrames:
    """The last frames of what a causal convolution reads."""
    match convolution:
        case Int8Conv():
            return KeptFrames(convolution.int8_weight.shape[1], PAST, scale, is_int8=True)
        case Conv():
            return KeptFrames(convolution.weight.shape[1], PAST, scale)
    raise TypeError(f"{type(convolution).__name__} is no convolution of the VAE")
