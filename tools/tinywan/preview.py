"""Train the preview decoder, from the VAE's latents to the drawn pictures."""

from pathlib import Path

import torch
from numpy.random import Generator
from torch import Tensor

from tools.tinywan.latents import Pool, quick
from tools.tinywan.training import Plan, train
from tools.tinywan.vae import NOISE, infidelity, latent_crops
from wanforge.configs.clip import latent_frames
from wanforge.configs.model import ModelConfig, PreviewConfig
from wanforge.runtime.reference.preview import MemoryBlock, PreviewConv, PreviewDecoder

SIZES = PreviewConfig(widths=(24, 16, 12, 12))
"""117,539 weights, which take 235 kB with 16 bits each."""
GAIN = 2**0.5
"""What makes up for the half of the values that each activation sets to zero."""
RESIDUAL_GAIN = 0.2
"""Initial gain of the last convolution of each block, relative to unit gain."""


def new_preview(seed: int = 0) -> PreviewDecoder:
    """A decoder ready to be trained: unit gain, blocks that change little at first, and grey pictures."""
    decoder, generator = PreviewDecoder(SIZES), torch.Generator().manual_seed(seed)
    for module in decoder.modules():
        if isinstance(module, PreviewConv):
            module.weight.data.normal_(0, GAIN * module.weight[0].numel() ** -0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.zero_()
    for module in decoder.modules():
        if isinstance(module, MemoryBlock):
            last = module.conv["4"]
            assert isinstance(last, PreviewConv)
            last.weight.data.mul_(RESIDUAL_GAIN)
    head = decoder.decoder["22"]
    assert isinstance(head, PreviewConv)
    assert head.bias is not None
    head.weight.data.mul_(RESIDUAL_GAIN)
    head.bias.data.fill_(0.5)
    return decoder


def train_preview(
    model: ModelConfig, decoder: PreviewDecoder, pool: Pool, folder: Path, plan: Plan, side: int
) -> PreviewDecoder:
    """Train on crops of whole clips, and in a fifth of the steps on the beginnings of whole frames.

    Args:
        side: Width and height of the crops in pixels.
    """
    every = latent_frames(model.video.frames)
    device = next(decoder.parameters()).device

    def loss_of(rng: Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pool.refresh()
        whole = rng.random() < 0.2
        rows = rng.integers(len(pool.scenes), size=2 if whole else plan.batch)
        latents, pixels, weight = latent_crops(rng, model, pool, rows, *((2, None) if whole else (every, side)))
        latents = latents + NOISE * torch.randn(latents.shape, generator=generator)
        out = decoder.decode(quick(latents.to(device))).float() * 2 - 1
        pixels, weight = pixels.to(device), weight.to(device)
        return infidelity(out, pixels, weight), {"l1": float((out - pixels).detach().abs().mean())}

    train("preview", folder, plan, decoder, loss_of)
    return decoder
