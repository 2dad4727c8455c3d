"""The Wan2.1 VAE. It is causal in time, so a clip passes through it in chunks that hand on their last frames.

Letters: B clips, C channels, T frames at the current rate, H W rows and columns.

A single definition serves three ways of running it, which differ only in where a causal layer gets its past from. That
is a `History`: `Whole` sees all frames at once; `First` is the opening chunk of one frame and records what the next
chunk needs; `Next` continues from the frames that the previous chunk recorded. A history also says which rows of the
pictures there are (`Rows`): all of them, or those of one of several GPUs. Parameters have upstream's names.

Source: Wan2.1, wan/modules/vae.py; TurboDiffusion, rcm/tokenizers/wan2pt1.py (docs/sources.md).
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanforge.configs.clip import SPATIAL_STRIDE, TEMPORAL_STRIDE
from wanforge.configs.model import VAEConfig
from wanforge.configs.recipe import VAEFormat
from wanforge.errors import ShapeError
from wanforge.plugins.channel_norm import PAST
from wanforge.plugins.channel_norm.reference import channel_norm, double
from wanforge.plugins.int8_convolution.op import channel_steps, int8_convolution

# fmt: off
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on
WIDTHS = (1, 2, 4, 4)
TEMPORAL_DOWNSAMPLING = (False, True, True)

Convolution = Callable[[Tensor], Tensor]


class Rows(Protocol):
    """The rows of the pictures that a process has."""

    def around(self, x: Tensor, function: Convolution, reach: int = 1) -> Tensor:
        """What a convolution gives at these rows, each of which may depend on `reach` rows above and below it.

        Args:
            x: These rows, ``[..., H, W]``.
        """
        ...

    def all(self, x: Tensor) -> Tensor:
        """Whole pictures ``[..., H, W]`` of these rows, or all positions ``[..., H * W, C]`` of those in these rows."""
        ...


class AllRows:
    """Whole pictures, which need nothing else."""

    def around(self, x: Tensor, function: Convolution, reach: int = 1) -> Tensor:
        return function(x)

    def all(self, x: Tensor) -> Tensor:
        return x


ALL_ROWS = AllRows()


class Whole:
    """All frames at once; the past of the first frame is zeros.

    Upstream processes chunks and never passes the first frame through the temporal resamplers; here the first frame is
    split off for the same result.
    """

    def __init__(self, rows: Rows = ALL_ROWS) -> None:
        self.rows = rows

    def causal(self, x: Tensor, convolve: Convolution) -> Tensor:
        return self.rows.around(F.pad(x, (0, 0, 0, 0, PAST, 0)), convolve)

    def downsample(self, x: Tensor, convolve: Convolution) -> Tensor:
        return torch.cat((x[:, :, :1], convolve(x)), 2) if x.shape[2] > 1 else x

    def upsample(self, x: Tensor, convolve: Convolution) -> Tensor:
        if x.shape[2] == 1:
            return x
        padded = F.pad(x[:, :, 1:], (0, 0, 0, 0, PAST, 0))
        return torch.cat((x[:, :, :1], interleave(convolve(padded))), 2)


class First(Whole):
    """The opening chunk of one frame; `kept` collects what the next chunk needs, in order of execution."""

    def __init__(self, rows: Rows = ALL_ROWS) -> None:
        super().__init__(rows)
        self.kept: list[Tensor] = []

    def causal(self, x: Tensor, convolve: Convolution) -> Tensor:
        padded = F.pad(x, (0, 0, 0, 0, PAST, 0))
        self.kept.append(padded[:, :, -PAST:])
        return self.rows.around(padded, convolve)

    def downsample(self, x: Tensor, convolve: Convolution) -> Tensor:
        self.kept.append(x)
        return x

    def upsample(self, x: Tensor, convolve: Convolution) -> Tensor:
        self.kept.append(torch.zeros_like(x).repeat(1, 1, PAST, 1, 1))
        return x


class Next:
    """A later chunk: every causal layer sees the frames kept from the previous chunk."""

    def __init__(self, past: Sequence[Tensor], rows: Rows = ALL_ROWS) -> None:
        self.rows = rows
        self.past = iter(past)
        self.kept: list[Tensor] = []

    def join(self, x: Tensor) -> Tensor:
        past = next(self.past)
        joined = torch.cat((past, x), 2)
        self.kept.append(joined[:, :, -past.shape[2] :])
        return joined

    def causal(self, x: Tensor, convolve: Convolution) -> Tensor:
        return self.rows.around(self.join(x), convolve)

    def downsample(self, x: Tensor, convolve: Convolution) -> Tensor:
        return convolve(self.join(x))

    def upsample(self, x: Tensor, convolve: Convolution) -> Tensor:
        return interleave(convolve(self.join(x)))


History = Whole | Next


def interleave(x_BCTHW: Tensor) -> Tensor:
    """``[B, 2C, T, H, W]`` as ``[B, C, 2T, H, W]``: the first half of the channels becomes the even frames."""
    return torch.stack(x_BCTHW.chunk(2, 1), 3).flatten(2, 3)


class Conv(nn.Module):
    """A convolution over the last axes, whose weights are cast to the type of its input."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, ...], stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False)
        # Time is never padded here (the history does that), and a 3D convolution strides only in time.
        self.stride = (stride, 1, 1) if len(kernel) == 3 else (stride, stride)
        self.padding = (0, padding, padding) if len(kernel) == 3 else (padding, padding)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        convolve = F.conv3d if weight.ndim == 5 else F.conv2d
        return convolve(x, weight, bias, self.stride, self.padding)


class Int8Conv(nn.Module):
    """A causal 3x3x3 convolution of the steps of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.empty(outputs, inputs, 3, 3, 3, dtype=torch.int8)
        self.int8_weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(outputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False)

    def forward(self, steps_BCTHW: Tensor) -> Tensor:
        return int8_convolution(steps_BCTHW, self.int8_weight, self.scale, self.bias)


class ChannelNorm(nn.Module):
    """`channel_norm` with a weight for each channel."""

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim, *(1,) * axes), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.gamma)


def causal_conv(inputs: int, outputs: int, form: VAEFormat) -> Conv | Int8Conv:
    """A 3x3x3 convolution behind a norm."""
    return Int8Conv(inputs, outputs) if form == "int8" else Conv(inputs, outputs, (3, 3, 3), padding=1)


def behind(norm: nn.Module, convolution: nn.Module, x: Tensor, history: History) -> Tensor:
    """A norm, SiLU and a causal convolution, whose past is kept in the form in which it is read."""
    y = F.silu(norm(x))
    if not isinstance(convolution, Int8Conv):
        return history.causal(y, convolution)
    assert isinstance(norm, ChannelNorm)
    return history.causal(channel_steps(y, norm.gamma), convolution).to(x.dtype)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, form: VAEFormat = "bf16") -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(inputs, 3),
                "2": causal_conv(inputs, outputs, form),
                "3": ChannelNorm(outputs, 3),
                "6": causal_conv(outputs, outputs, form),
            }
        )
        self.shortcut = Conv(inputs, outputs, (1, 1, 1)) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, history: History) -> Tensor:
        part = self.residual
        y = behind(part["3"], part["6"], behind(part["0"], part["2"], x, history), history)
        return self.shortcut(x) + y


class FrameAttention(nn.Module):
    """Self-attention over the positions of each frame, with a single head as wide as the layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, 2)
        self.to_qkv = Conv(dim, 3 * dim, (1, 1))
        self.proj = Conv(dim, dim, (1, 1))

    def forward(self, x_BCTHW: Tensor, history: History) -> Tensor:
        batch, _, frames, height, width = x_BCTHW.shape
        x_NCHW = x_BCTHW.transpose(1, 2).flatten(0, 1)
        q, k, v = self.to_qkv(self.norm(x_NCHW)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
        k, v = history.rows.all(k), history.rows.all(v)
        y_NLC = F.scaled_dot_product_attention(q, k, v)[:, 0]
        y_NCHW = self.proj(y_NLC.transpose(1, 2).unflatten(2, (height, width)))
        return x_BCTHW + y_NCHW.unflatten(0, (batch, frames)).transpose(1, 2)


class Downsample(nn.Module):
    """Halve the rows and columns and then, with `temporal`, the frames."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv(dim, dim, (3, 3), stride=2)})
        self.time_conv = Conv(dim, dim, (3, 1, 1), stride=2) if temporal else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        # Two rows, so that those above and below come in pairs, as the rows that are halved do.
        x = per_frame(x, lambda frames: history.rows.around(frames, self.halved, reach=2))
        return x if self.time_conv is None else history.downsample(x, self.time_conv)

    def halved(self, x_NCHW: Tensor) -> Tensor:
        return self.resample["1"](F.pad(x_NCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """With `temporal`, double the frames; then double the rows and columns and halve the channels."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv(dim, dim // 2, (3, 3), padding=1)})
        self.time_conv = Conv(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        if self.time_conv is not None:
            x = history.upsample(x, self.time_conv)
        return per_frame(x, lambda frames: history.rows.around(frames, self.doubled))

    def doubled(self, x_NCHW: Tensor) -> Tensor:
        return self.resample["1"](double(x_NCHW))


def per_frame(x_BCTHW: Tensor, function: Convolution) -> Tensor:
    """Apply an operation on single images to every frame."""
    batch = x_BCTHW.shape[0]
    y_NCHW = function(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return y_NCHW.unflatten(0, (batch, -1)).transpose(1, 2)


def run(layers: nn.ModuleList, x: Tensor, history: History) -> Tensor:
    for layer in layers:
        x = layer(x, history)
    return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.dim * factor for factor in (1, *WIDTHS)]
        self.conv1 = Conv(3, dims[0], (3, 3, 3), padding=1)
        self.downsamples = nn.ModuleList()
        for level, (inputs, outputs) in enumerate(pairwise(dims)):
            self.downsamples += [Residual(inputs, outputs), Residual(outputs, outputs)]
            if level < len(TEMPORAL_DOWNSAMPLING):
                self.downsamples.append(Downsample(outputs, TEMPORAL_DOWNSAMPLING[level]))
        self.middle = middle(dims[-1])
        self.head = head(dims[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = history.causal(x, self.conv1)
        x = run(self.middle, run(self.downsamples, x, history), history)
        return behind(self.head["0"], self.head["2"], x, history)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig, form: VAEFormat) -> None:
        super().__init__()
        dims = [config.dim * factor for factor in (WIDTHS[-1], *reversed(WIDTHS))]
        self.conv1 = Conv(config.latent_channels, dims[0], (3, 3, 3), padding=1)
        self.middle = middle(dims[0], form)
        self.upsamples = nn.ModuleList()
        temporal = TEMPORAL_DOWNSAMPLING[::-1]
        for level, (inputs, outputs) in enumerate(pairwise(dims)):
            # An upsampler halves the channels of the level before it.
            inputs = inputs // 2 if level else inputs
            self.upsamples += [
                Residual(inputs, outputs, form),
                Residual(outputs, outputs, form),
                Residual(outputs, outputs, form),
            ]
            if level < len(temporal):
                self.upsamples.append(Upsample(outputs, temporal[level]))
        self.head = head(dims[-1], 3, form)

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = history.causal(x, self.conv1)
        x = run(self.upsamples, run(self.middle, x, history), history)
        return behind(self.head["0"], self.head["2"], x, history)


def middle(dim: int, form: VAEFormat = "bf16") -> nn.ModuleList:
    return nn.ModuleList([Residual(dim, dim, form), FrameAttention(dim), Residual(dim, dim, form)])


def head(inputs: int, outputs: int, form: VAEFormat = "bf16") -> nn.ModuleDict:
    return nn.ModuleDict({"0": ChannelNorm(inputs, 3), "2": causal_conv(inputs, outputs, form)})


class VAE(nn.Module):
    """Converts pixels in [-1, 1] to normalised latents and back. The compute type is that of the input.

    Args:
        form: The format of the decoder's 3x3x3 convolutions behind a norm; see `Recipe.vae`.
    """

    def __init__(self, config: VAEConfig, form: VAEFormat = "bf16") -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config, form)
        self.conv1 = Conv(2 * channels, 2 * channels, (1, 1, 1))
        self.conv2 = Conv(channels, channels, (1, 1, 1))

    def encode(self, pixels_BCTHW: Tensor) -> Tensor:
        """Encode a whole clip ``[B, 3, 4n+1, H, W]`` to normalised latents ``[B, 16, n+1, H/8, W/8]``, without noise.

        Raises:
            ShapeError: The number of frames is not 4n+1, or H or W is not a multiple of 8.
        """
        _, channels, frames, height, width = pixels_BCTHW.shape
        if channels != 3 or frames % TEMPORAL_STRIDE != 1 or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise ShapeError(
                f"pixels have shape {tuple(pixels_BCTHW.shape)}; expected [B, 3, 4n+1, H, W], H and W multiples of 8"
            )
        return self.encode_chunk(pixels_BCTHW, Whole())

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Decode the normalised latents of a whole clip to pixels, which are not clamped."""
        return self.decode_chunk(latents_BCTHW, Whole())

    def encode_first(self, pixels_BCTHW: Tensor, rows: Rows = ALL_ROWS) -> tuple[Tensor, list[Tensor]]:
        """Encode the first frame. Return its latent frame and 24 caches for `encode_next`."""
        history = First(rows)
        return self.encode_chunk(pixels_BCTHW, history), history.kept

    def encode_next(
        self, pixels_BCTHW: Tensor, caches: Sequence[Tensor], rows: Rows = ALL_ROWS
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode four more frames. Return one latent frame and the caches for the next call."""
        history = Next(caches, rows)
        return self.encode_chunk(pixels_BCTHW, history), history.kept

    def decode_first(self, latents_BCTHW: Tensor, rows: Rows = ALL_ROWS) -> tuple[Tensor, list[Tensor]]:
        """Decode the first latent frame. Return one frame of pixels and 32 caches for `decode_next`."""
        history = First(rows)
        return self.decode_chunk(latents_BCTHW, history), history.kept

    def decode_next(
        self, latents_BCTHW: Tensor, caches: Sequence[Tensor], rows: Rows = ALL_ROWS
    ) -> tuple[Tensor, list[Tensor]]:
        """Decode one more latent frame. Return four frames and the caches for the next call."""
        history = Next(caches, rows)
        return self.decode_chunk(latents_BCTHW, history), history.kept

    def encode_chunk(self, pixels_BCTHW: Tensor, history: History) -> Tensor:
        mean_BCTHW = self.conv1(self.encoder(pixels_BCTHW, history)).chunk(2, 1)[0]
        mean, std = latent_statistics(mean_BCTHW)
        return (mean_BCTHW - mean) * (1.0 / std)

    def decode_chunk(self, latents_BCTHW: Tensor, history: History) -> Tensor:
        mean, std = latent_statistics(latents_BCTHW)
        return self.decoder(self.conv2(latents_BCTHW / (1.0 / std) + mean), history)


def latent_statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation of each latent channel, ``[16, 1, 1, 1]`` in the type of `like`.

    They are copied to a device once, because nothing can be copied there while a CUDA graph is captured.
    """
    return _latent_statistics(like.dtype, like.device)


@cache
@torch.inference_mode(False)
def _latent_statistics(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(each, dtype=dtype, device=device) for each in (LATENT_MEAN, LATENT_STD))
    return mean[:, None, None, None], std[:, None, None, None]
