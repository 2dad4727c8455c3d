"""TAEHV, a tiny decoder that shows roughly what latents hold at a small part of the VAE's cost.

Letters: B clips, T frames at the current rate, C channels, H W rows and columns.

It is strictly causal. All that it keeps of the past is the last input of each of its nine blocks with memory, so it
decodes a clip a latent frame at a time, or any number of them at once, with the same result. Four frames come out for
each latent frame, and the first three of a clip are dropped. Parameters have upstream's names.

Source: TAEHV, taehv.py; LightX2V, whose files expect latents that are not normalised (docs/sources.md).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanforge.configs.model import PreviewConfig
from wanforge.plugins.channel_norm.reference import double
from wanforge.runtime.reference.vae import latent_statistics

BLOCKS = 3
"""The number of blocks with memory at each resolution."""
GROWTH = (1, 2, 2)
"""How many frames come of one where each resolution ends."""
LEVEL = 6
"""The number of layers of each resolution, as upstream counts them: its blocks, doubled pixels, more frames, and a
convolution."""
DROPPED = 3
"""The number of pictures at the beginning of a clip that are dropped."""
BOUND = 3.0
"""Latents are bent so that none is larger than this."""


class PreviewConv(nn.Module):
    """A convolution of pictures that keeps their size, whose weights are cast to the type of its input."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, biased: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if biased else None
        self.padding = kernel // 2

    def forward(self, x_NCHW: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x_NCHW.dtype)
        return F.conv2d(x_NCHW, self.weight.to(x_NCHW.dtype), bias, (1, 1), (self.padding, self.padding))


class MemoryBlock(nn.Module):
    """A residual block of three convolutions that sees each frame beside the frame before it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict(
            {"0": PreviewConv(2 * dim, dim), "2": PreviewConv(dim, dim), "4": PreviewConv(dim, dim)}
        )

    def forward(self, x_BTCHW: Tensor, past_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output, and its last input frame, which is the past of the next call."""
        joined = torch.cat((past_BCHW[:, None], x_BTCHW), 1)
        y = torch.cat((x_BTCHW, joined[:, :-1]), 2)
        for name in ("0", "2"):
            y = F.relu(each_frame(y, self.conv[name]))
        return F.relu(each_frame(y, self.conv["4"]) + x_BTCHW), joined[:, -1]


class Growth(nn.Module):
    """Make several frames of each, from channels of its own for each of them."""

    def __init__(self, dim: int, factor: int) -> None:
        super().__init__()
        self.conv, self.factor = PreviewConv(dim, dim * factor, 1, biased=False), factor

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        grown = each_frame(x_BTCHW, self.conv)
        return grown.unflatten(2, (self.factor, x_BTCHW.shape[2])).flatten(1, 2)


class PreviewDecoder(nn.Module):
    """Turns normalised latents into pictures. The compute type is that of the input."""

    def __init__(self, config: PreviewConfig) -> None:
        super().__init__()
        self.config = config
        layers: dict[str, nn.Module] = {"1": PreviewConv(config.latent_channels, config.widths[0])}
        for level, factor in enumerate(GROWTH):
            dim, following, first = config.widths[level], config.widths[level + 1], BLOCKS + LEVEL * level
            layers |= {str(first + place): MemoryBlock(dim) for place in range(BLOCKS)}
            layers[str(first + 4)] = Growth(dim, factor)
            layers[str(first + 5)] = PreviewConv(dim, following, biased=False)
        layers["22"] = PreviewConv(config.widths[-1], 3)
        self.decoder = nn.ModuleDict(layers)

    def states(self) -> list[tuple[int, int]]:
        """Channels of each state, and its rows and columns as multiples of the latent's."""
        return [(self.config.widths[level], 2**level) for level in range(len(GROWTH)) for _ in range(BLOCKS)]

    def beginning(self, latents_BCTHW: Tensor) -> list[Tensor]:
        """The states before the first latent frame of a clip, which are zeros."""
        batch, _, _, height, width = latents_BCTHW.shape
        return [latents_BCTHW.new_zeros(batch, dim, height * n, width * n) for dim, n in self.states()]

    def decode_next(self, latents_BCTHW: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode the next latent frames of a clip.

        Args:
            latents_BCTHW: Normalised latents ``[B, 16, T, H, W]``, usually of one frame.
            states: What the call before returned; at first, `beginning`.

        Returns:
            Pictures ``[B, 3, 4T, 8H, 8W]``, which are meant to lie between 0 and 1 and are not clamped, and the states
            for the next call.
        """
        if self.config.latents == "scaled":
            mean, std = latent_statistics(latents_BCTHW)
            latents_BCTHW = latents_BCTHW * std + mean
        past, kept = iter(states), []
        x = torch.tanh(latents_BCTHW.transpose(1, 2) / BOUND) * BOUND
        x = F.relu(each_frame(x, self.decoder["1"]))
        for level in range(len(GROWTH)):
            first = BLOCKS + LEVEL * level
            for place in range(BLOCKS):
                x, last = self.decoder[str(first + place)](x, next(past))
                kept.append(last)
            x = self.decoder[str(first + 4)](each_frame(x, double))
            x = each_frame(x, self.decoder[str(first + 5)])
        return each_frame(F.relu(x), self.decoder["22"]).transpose(1, 2), kept

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Decode a whole clip ``[B, 16, F, H, W]`` to its ``4F-3`` pictures at once."""
        pictures, _ = self.decode_next(latents_BCTHW, self.beginning(latents_BCTHW))
        return pictures[:, :, DROPPED:]


def each_frame(x_BTCHW: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an operation on single pictures to every frame."""
    return function(x_BTCHW.flatten(0, 1)).unflatten(0, (x_BTCHW.shape[0], -1))
