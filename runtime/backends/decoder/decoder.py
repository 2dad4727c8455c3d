"""The VAE's decoder as kernels and convolutions of PyTorch: computes the same as `runtime.reference.vae.VAE`.

The residual stream and every branch lie with their channels last. One kernel between two convolutions adds the branch
to the stream, normalises and activates the sum, and writes it behind the frames of the past, which makes the input of
the next convolution, and into the cache for the next chunk. Doubled pixels are never written: the convolution that
follows them is folded (`plugins.channel_norm.reference.folded_weight`).

Letters: T frames, P frames of the past, H W rows and columns, C channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, update_wrapper

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanforge.errors import ConfigError, ShapeError
from wanforge.plugins.channel_norm.fused import History, Stream, forget, joined, normed, summed
from wanforge.plugins.int8_convolution import fused as int8_convolution
from wanforge.plugins.int8_convolution.fused import ConvolutionWeight
from wanforge.plugins.launching.call import library, library_into
from wanforge.runtime.backends.decoder.weights import GAIN, MEAN, STD, STEPS
from wanforge.runtime.graphs import Graph
from wanforge.runtime.reference.ranks.strips import Strip
from wanforge.runtime.reference.vae import ALL_ROWS, VAE, Conv, FrameAttention, Int8Conv, Residual, Rows, Upsample

Weights = Mapping[str, Tensor]
Convolution = Callable[..., Tensor]
"""A function of frames, a weight and a bias."""


NOT_DIVIDED = (
    'a recipe with vae = "int8" decodes on one GPU, not on several; import the checkpoint with a recipe whose decoder '
    "is in bfloat16, such as w8a8"
)


class FusedDecoder:
    """The decoder of a VAE.

    Args:
        vae: Its modules, whose weights are not used.
        strip: The rows of pictures that this process has; None if it has all.

    Raises:
        ConfigError: Convolutions in int8 are to see the rows of other processes.
    """

    def __init__(self, vae: VAE, strip: Strip | None = None) -> None:
        if strip is not None and any(isinstance(layer, Int8Conv) for layer in vae.modules()):
            raise ConfigError(NOT_DIVIDED)
        self.vae = vae
        self.names = {module: name for name, module in vae.named_modules()}
        self.convolve, self.convolve_folded = (in_strip(strip, each) for each in (convolve, convolve_folded))
        self.pixels = named(partial(pixels, self.convolve), pixels)
        self.attend = named(partial(attend, strip or ALL_ROWS), attend)

    def run(
        self,
        weights: Weights,
        latent_BCTHW: Tensor,
        past: Sequence[Tensor] | None,
        pixels_BCTHW: Tensor,
        kept: Sequence[Tensor],
    ) -> None:
        """Decode a latent frame, as the graph `FIRST` if there is no past, otherwise as `NEXT`.

        Args:
            weights: See `weights.laid_out`.
            latent_BCTHW: ``[1, 16, 1, H, W]``.
            past: The caches that the chunk before it kept; see `channels_last`.
            pixels_BCTHW: Receives the frames.
            kept: Receive the caches for the next chunk.

        Raises:
            ShapeError: There is more than one sample, or a cache does not lie with its channels last.
        """
        if len(latent_BCTHW) != 1:
            raise ShapeError(f"the kernels decode one sample at a time, not {len(latent_BCTHW)}")
        Chunk(self, weights, past, kept).decode(latent_BCTHW, pixels_BCTHW)


def decoder_of(graph: Graph, strip: Strip | None = None) -> FusedDecoder:
    """The decoder of the VAE that a graph belongs to."""
    assert isinstance(graph.owner, VAE)
    return FusedDecoder(graph.owner, strip)


class Chunk:
    """One chunk on its way through the decoder, which takes the caches in the order of the causal layers."""

    def __init__(
        self, decoder: FusedDecoder, weights: Weights, past: Sequence[Tensor] | None, kept: Sequence[Tensor]
    ) -> None:
        self.decoder, self.weights, self.dtype = decoder, weights, weights[MEAN].dtype
        self.is_first = past is None
        before: Sequence[Tensor | None] = past or [None] * len(kept)
        self.caches: Iterator[tuple[Tensor | None, Tensor]] = zip(before, kept, strict=True)

    def decode(self, latent_BCTHW: Tensor, pixels_BCTHW: Tensor) -> None:
        vae = self.decoder.vae
        latent = library(unscaled, latent_BCTHW, self.weights[MEAN], self.weights[STD], *self.of(vae.conv2))
        x_THWC = joined(Stream(latent), self.history())
        stream = Stream(self.convolve(vae.decoder.conv1, x_THWC))
        for layer in (*vae.decoder.middle, *vae.decoder.upsamples):
            match layer:
                case Residual():
                    stream = self.residual(layer, stream)
                case FrameAttention():
                    stream = self.attend(layer, stream)
                case Upsample():
                    stream = self.upsample(layer, stream)
        norm, convolution = vae.decoder.head["0"], vae.decoder.head["2"]
        x_THWC, _ = self.activated(norm, convolution, stream, keeps_sum=False)
        if isinstance(convolution, Int8Conv):
            library_into(pixels_BCTHW, channels_first, self.convolve(convolution, x_THWC))
        else:
            library_into(pixels_BCTHW, self.decoder.pixels, x_THWC, *self.of(convolution))

    def residual(self, layer: Residual, stream: Stream) -> Stream:
        part = layer.residual
        x_THWC, stream = self.activated(part["0"], part["2"], stream)
        y_THWC = self.convolve(part["2"], x_THWC)
        x_THWC, _ = self.activated(part["3"], part["6"], Stream(y_THWC))
        if isinstance(layer.shortcut, Conv):
            stream = Stream(library(F.linear, summed(stream), *self.of(layer.shortcut)))
        if isinstance(part["6"], Int8Conv):
            return Stream(self.convolve(part["6"], x_THWC, summed(stream)))
        return Stream(stream.x, self.convolve(part["6"], x_THWC))

    def activated(
        self, norm: nn.Module, convolution: nn.Module, stream: Stream, *, keeps_sum: bool = True
    ) -> tuple[Tensor, Stream]:
        """The input of a convolution behind a norm and SiLU, and the stream; see `normed`."""
        steps = self.weights[self.decoder.names[norm] + STEPS] if isinstance(convolution, Int8Conv) else None
        return normed(stream, self.gain(norm), self.history(), steps_C=steps, keeps_sum=keeps_sum)

    def attend(self, layer: FrameAttention, stream: Stream) -> Stream:
        x_THWC, stream = normed(stream, self.gain(layer.norm), activates=False)
        attention = self.decoder.attend
        return Stream(stream.x, library(attention, x_THWC, *self.of(layer.to_qkv), *self.of(layer.proj)))

    def upsample(self, layer: Upsample, stream: Stream) -> Stream:
        if layer.time_conv is None:
            x_THWC = summed(stream)
        elif self.is_first:
            forget(self.history())
            x_THWC = summed(stream)
        else:
            y_THWC = library(convolve_frames, joined(stream, self.history()), *self.of(layer.time_conv))
            x_THWC = library(interleaved, y_THWC)
        y_THWC = library(self.decoder.convolve_folded, x_THWC, *self.of(layer.resample["1"]))
        return Stream(y_THWC.unflatten(3, (4, -1)))

    def convolve(self, layer: nn.Module, x_THWC: Tensor, residual_THWC: Tensor | None = None) -> Tensor:
        """A causal convolution; one in int8 adds the residual."""
        if not isinstance(layer, Int8Conv):
            return library(self.decoder.convolve, x_THWC, *self.of(layer))
        name = self.decoder.names[layer]
        weight = ConvolutionWeight(*(self.weights[f"{name}.{part}"] for part in ("int8_weight", "scale", "bias")))
        return int8_convolution.convolve(x_THWC, weight, self.dtype, residual_THWC)

    def history(self) -> History:
        past, kept = next(self.caches)
        return History(None if past is None else frames_first(past), frames_first(kept))

    def gain(self, layer: nn.Module) -> Tensor:
        return self.weights[self.decoder.names[layer] + GAIN]

    def of(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """The weight and bias of a convolution."""
        name = self.decoder.names[layer]
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]


def channels_last(buffer_BCTHW: Tensor) -> Tensor:
    """The memory of a contiguous buffer as a tensor of the same shape whose channels lie last."""
    batch, channels, *others = buffer_BCTHW.shape
    return buffer_BCTHW.view(batch, *others, channels).movedim(-1, 1)


def frames_first(x_BCTHW: Tensor) -> Tensor:
    """One sample as ``[T, H, W, C]``."""
    return x_BCTHW[0].movedim(0, -1)


def channels_first(x_THWC: Tensor) -> Tensor:
    """Frames as one sample ``[1, C, T, H, W]``, with strides by which PyTorch sees that its channels lie last."""
    return x_THWC[None].movedim(-1, 1)


# What PyTorch computes between the kernels.


def unscaled(latent_BCTHW: Tensor, mean_C: Tensor, std_C: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalised latents as the decoder's first convolution takes them."""
    return F.linear(frames_first(latent_BCTHW) / (1.0 / std_C) + mean_C, weight, bias)


def convolve(x_THWC: Tensor, weight: Tensor, bias: Tensor, around: int = 1) -> Tensor:
    """A causal 3x3x3 convolution, whose input begins with the frames of the past.

    Args:
        around: The number of rows of zeros above and below.
    """
    return frames_first(F.conv3d(channels_first(x_THWC), weight, bias, padding=(0, around, 1)))


def pixels(convolution: Convolution, x_THWC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What `convolve` gives, as one sample with its channels first."""
    return channels_first(convolution(x_THWC, weight, bias))


def convolve_frames(x_THWC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A causal convolution over frames alone."""
    return frames_first(F.conv3d(channels_first(x_THWC), weight, bias))


def interleaved(x_THWC: Tensor) -> Tensor:
    """Twice as many frames of half the channels; the first half of the channels is the even frames."""
    return torch.stack(x_THWC.chunk(2, -1), 1).flatten(0, 1)


def convolve_folded(x_THWC: Tensor, weight: Tensor, bias: Tensor, around: int = 1) -> Tensor:
    """The convolution of doubled pixels, ``[T, H + 1, W + 1, 4 * C]``; see `convolve`."""
    return F.conv2d(x_THWC.movedim(-1, 1), weight, bias, padding=(around, 1)).movedim(1, -1)


def convolve_in(strip: Strip, convolution: Convolution, x_THWC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution at the rows of a strip. Its first and its last row are computed again, as soon as the rows next to
    the strip are there, so that the strip is not copied to have them beside it."""
    y_THWC, taps = convolution(x_THWC, weight, bias), weight.shape[-2]
    above, below = strip.borders(x_THWC, 1)
    top_THWC = torch.cat((above, x_THWC[:, : taps - 1], below), 1)[:, :taps]
    bottom_THWC = torch.cat((above, x_THWC[:, 1 - taps :], below), 1)[:, -taps:]
    y_THWC[:, :1] = convolution(top_THWC.contiguous(), weight, bias, 0)
    y_THWC[:, -1:] = convolution(bottom_THWC.contiguous(), weight, bias, 0)
    return y_THWC


def in_strip(strip: Strip | None, convolution: Convolution) -> Convolution:
    """A convolution at the rows of a strip, or of whole pictures if there is none."""
    return convolution if strip is None else named(partial(convolve_in, strip, convolution), convolution)


def named(function: Convolution, like: Convolution) -> Convolution:
    """A function under the name of another, as reports show it."""
    return update_wrapper(function, like)


def attend(rows: Rows, x_THWC: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Attention over the positions of each frame, with one head."""
    q, k, v = F.linear(x_THWC.flatten(1, 2)[:, None], qkv_weight, qkv_bias).chunk(3, -1)
    y_TNC = F.scaled_dot_product_attention(q, rows.all(k), rows.all(v))[:, 0]
    return F.linear(y_TNC, weight, bias).view(x_THWC.shape)
