"""Train the preview decoder, from the VAE's latents to the drawn pictures."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from tools.tinywan.latents import Pool, frames_of_pixels, pixels_of, quick
from tools.tinywan.scenes import draw_scene
from tools.tinywan.training import Plan, train
from tools.tinywan.vae import NOISE, infidelity, latent_crops
from wanforge.configs.clip import latent_frames
from wanforge.configs.model import ModelConfig, PreviewConfig
from wanforge.runtime.measure.parity.metrics import difference
from wanforge.runtime.reference.preview import MemoryBlock, PreviewConv, PreviewDecoder
from wanforge.runtime.reference.vae import VAE

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


@dataclass(frozen=True)
class Likeness:
    """How near decoded clips are to others, as the mean over clips of the ratio of signal to noise in dB.

    Attributes:
        clips: Every clip as it is drawn, as the VAE decodes it, and as the preview decoder does, uint8.
    """

    clips: list[NDArray[np.uint8]]
    vae_to_drawn: float
    preview_to_drawn: float
    preview_to_vae: float

    def __str__(self) -> str:
        return (
            f"preview to drawn scenes {self.preview_to_drawn:.2f} dB, to the VAE's {self.preview_to_vae:.2f} dB; "
            f"the VAE's to drawn scenes {self.vae_to_drawn:.2f} dB"
        )


@torch.no_grad()
def likeness(model: ModelConfig, vae: VAE, decoder: PreviewDecoder, count: int = 6) -> Likeness:
    """Compare clips of scenes that training never shows."""
    rng, clips, found = np.random.default_rng(99), [], []
    width, height = model.video.size_wh
    for _ in range(count):
        scene = draw_scene(rng, model.video.size_wh, model.video.frames, unseen=True)
        drawn = pixels_of(model, scene)[..., :height, :width]
        latents = vae.encode(quick(drawn)).float()
        decoded = vae.decode(quick(latents)).float().clamp(-1, 1)
        shown = decoder.decode(latents).clamp(0, 1) * 2 - 1
        pairs = ((decoded, drawn), (shown, drawn), (shown, decoded))
        found.append([difference(one, other, peak=2.0).psnr_db for one, other in pairs])
        clips += [frames_of_pixels(x) for x in (drawn, decoded, shown)]
    return Likeness(clips, *(float(value) for value in np.mean(found, 0)))
