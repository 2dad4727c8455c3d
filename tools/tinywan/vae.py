"""Train the VAE, from pixels to latents and back, on crops.

Noise of a fixed size is added to the latents before they are decoded. Together with a small pull towards zero it makes
a variational bottleneck with a constant deviation: similar latents must decode to similar pictures.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tools.tinywan.latents import Pool, quick, window
from tools.tinywan.scenes import Scene, draw_scene, render
from tools.tinywan.training import Plan, train
from wanforge.configs.clip import SPATIAL_STRIDE, TEMPORAL_STRIDE, latent_frames
from wanforge.configs.model import ModelConfig
from wanforge.runtime.reference.vae import (
    LATENT_MEAN,
    LATENT_STD,
    VAE,
    ChannelNorm,
    Conv,
    Downsample,
    FrameAttention,
    Residual,
    Upsample,
)

NOISE = 0.2
"""Standard deviation of the noise on the latents, whose own is about one."""
PULL = 1e-3
"""Weight of the mean square of the latents."""
SMOOTH = 0.2
"""Pixel error above which the loss is absolute instead of squared; the range of pixels is 2."""
FOREGROUND = 4.0
"""Weight of a foreground pixel; a background pixel has 1."""


def new_vae(model: ModelConfig, seed: int = 0) -> VAE:
    """A VAE ready to be trained: unit gain, residual branches that begin near zero, latents around zero.

    It begins as an autoencoder of single pictures: convolutions see only the present frame, and the temporal resamplers
    average and repeat. With random weights for past frames too, it would learn each position in the clip separately.
    """
    vae = VAE(model.vae)
    generator = torch.Generator().manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, Conv):
            present = module.weight.data[:, :, -1:] if module.weight.ndim == 5 else module.weight.data
            module.weight.data.zero_()
            present.normal_(0, present[0].numel() ** -0.5, generator=generator)
            module.bias.data.zero_()
        if isinstance(module, ChannelNorm):
            module.gamma.data.fill_(1)
    for module in vae.modules():
        if isinstance(module, Residual):
            last = module.residual["6"]
            assert isinstance(last, Conv)
            last.weight.data.mul_(0.2)
        if isinstance(module, Downsample | Upsample) and module.time_conv is not None:
            weight = module.time_conv.weight.data[..., 0, 0]
            weight.normal_(0, 0.2 * weight[0].numel() ** -0.5, generator=generator)
            same = torch.eye(weight.shape[1])
            if isinstance(module, Downsample):
                weight += torch.stack((torch.zeros_like(same), same / 2, same / 2), -1)
            else:
                weight[..., -1] += torch.cat((same, same))
        if isinstance(module, FrameAttention):
            module.proj.weight.data.mul_(0.2)
    channels = model.vae.latent_channels
    mean, deviation = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    shape = (-1, 1, 1, 1, 1)
    # The layers next to the latents begin by cancelling the pipeline's normalisation.
    vae.conv1.weight.data[:channels] *= deviation.view(shape)
    vae.conv1.bias.data[:channels] = mean
    vae.conv1.weight.data[channels:] = 0
    vae.conv1.bias.data[channels:] = float(np.log(NOISE**2))
    vae.conv2.weight.data /= deviation.view(1, -1, 1, 1, 1)
    vae.conv2.bias.data -= vae.conv2.weight.data.flatten(1) @ mean
    return vae


def train_vae(
    model: ModelConfig,
    vae: VAE,
    phase: str,
    folder: Path,
    plan: Plan,
    *,
    crop: tuple[int, int],
    compiled: bool = False,
) -> VAE:
    """Train on crops, and in a fifth of the steps on whole frames, because the attention layer sees a frame at once.

    Args:
        crop: The number of frames of a crop, and its width and height in pixels.
    """
    encode, decode = quickly(vae, compiled)
    frames, side = crop

    def loss_of(rng: Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        whole = rng.random() < 0.2
        shown = (1 if frames > 1 else 4, min(frames, 5), None) if whole else (plan.batch, frames, side)
        device = vae.conv1.weight.device
        pixels, weight = (x.to(device) for x in crops(rng, model, *shown))
        noise = torch.randn(latent_shape(pixels, model), generator=generator).to(device) * NOISE
        latents = encode(quick(pixels)).float()
        out = decode(quick(latents + noise)).float()
        pull = latents.square().mean()
        notes = {"l1": float((out - pixels).detach().abs().mean()), "latent_rms": float(pull.detach().sqrt())}
        return infidelity(out, pixels, weight) + PULL * pull, notes

    train(phase, folder, plan, vae, loss_of)
    return vae


def quickly(vae: VAE, compiled: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The functions that encode and decode, compiled separately for each shape if `compiled`: PyTorch's compiler fails
    on this backward pass with dynamic shapes."""
    if not compiled:
        return vae.encode, vae.decode
    return torch.compile(vae.encode, dynamic=False), torch.compile(vae.decode, dynamic=False)


def infidelity(out: Tensor, pixels: Tensor, weight: Tensor) -> Tensor:
    """The weighted distance, absolute above `SMOOTH` and squared below.

    A plain absolute distance pulls every background pixel with the same force however near it is, which a batch of a
    few clips does not average out: with it, clips got worse with every step.
    """
    error = F.smooth_l1_loss(out, pixels, beta=SMOOTH, reduction="none")
    return (error * weight).sum() / (weight.sum() * 3)


def latent_shape(pixels_BCTHW: Tensor, model: ModelConfig) -> tuple[int, ...]:
    batch, _, frames, height, width = pixels_BCTHW.shape
    cells = (height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
    return (batch, model.vae.latent_channels, latent_frames(frames), *cells)


def crops(rng: Generator, model: ModelConfig, batch: int, frames: int, side: int | None) -> tuple[Tensor, Tensor]:
    """Pixels in [-1, 1] ``[B, 3, T, S, S]`` and each pixel's weight ``[B, 1, T, S, S]``, cut from scenes around one of
    the things in them; the crops are whole frames if `side` is None."""
    video, cut_wh = model.video, cut_size(model, side)
    clips = []
    for _ in range(batch):
        scene = draw_scene(rng, video.size_wh, video.frames)
        start = int(rng.integers(video.frames - frames + 1))
        clip = render(scene, video.frames, range(start, start + frames))
        x, y = corner(rng, scene, start + frames // 2, video.frames, cut_wh)
        clips.append(clip[:, y : y + cut_wh[1], x : x + cut_wh[0]])
    return weighted(clips)


def cut_size(model: ModelConfig, side: int | None) -> tuple[int, int]:
    return model.video.size_wh if side is None else (side, side)


def corner(rng: Generator, scene: Scene, frame: int, frames: int, cut_wh: tuple[int, int]) -> tuple[int, int]:
    """The corner of a crop that shows at least part of one of the scene's things."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    x, y = (
        int(np.clip(at + rng.uniform(-cut, cut) / 2 - cut / 2, 0, extent - cut))
        for at, cut, extent in zip(thing.centre(frame, frames), cut_wh, scene.size_wh, strict=True)
    )
    return x, y


def weighted(clips: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """Convert clips from 0 to 255 ``[T, H, W, 3]`` to the pixels and weights of `crops`."""
    weights = [1 + (FOREGROUND - 1) * (np.ptp(clip, -1) > 24) for clip in clips]
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3) / 127.5 - 1
    return pixels.contiguous(), torch.from_numpy(np.stack(weights)).float()[:, None]


@torch.no_grad()
def settle_latents(vae: VAE, model: ModelConfig, samples: int = 64, seed: int = 1) -> VAE:
    """Fold the statistics of trained latents into the layers next to them, so that every channel has mean 0 and
    deviation 1; the decoded pixels stay the same."""
    rng = np.random.default_rng(seed)
    clips = [crops(rng, model, 1, model.video.frames, None)[0] for _ in range(samples)]
    latents = torch.cat([vae.encode(quick(clip)).float() for clip in clips])
    mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    pipeline_mean, pipeline_deviation = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    channels = model.vae.latent_channels
    vae.conv1.weight[:channels] /= deviation.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:channels] = (
        vae.conv1.bias[:channels] - pipeline_mean - pipeline_deviation * mean
    ) / deviation + pipeline_mean
    vae.conv2.bias.add_(vae.conv2.weight.flatten(1) @ (pipeline_mean * (1 - deviation) + mean * pipeline_deviation))
    vae.conv2.weight.mul_(deviation.view(1, -1, 1, 1, 1))
    return vae


def train_decoder(
    model: ModelConfig,
    vae: VAE,
    pool: Pool,
    folder: Path,
    plan: Plan,
    *,
    compiled: bool = False,
) -> VAE:
    """Continue to train the decoder alone, on latents such as the denoiser learns to make."""
    decoder = decoder_of(vae)
    _, decode = quickly(vae, compiled)
    every = latent_frames(model.video.frames)

    def loss_of(rng: Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        whole = rng.random() < 0.2
        rows = rng.integers(len(pool.scenes), size=1 if whole else plan.batch)
        latents, pixels, weight = latent_crops(rng, model, pool, rows, *((2, None) if whole else (every, 48)))
        device = vae.conv1.weight.device
        latents = (latents + NOISE * torch.randn(latents.shape, generator=generator)).to(device)
        out = decode(quick(latents)).float()
        pixels, weight = pixels.to(device), weight.to(device)
        return infidelity(out, pixels, weight), {"l1": float((out - pixels).detach().abs().mean())}

    vae.requires_grad_(False)
    train("decoder", folder, plan, decoder, loss_of)
    return vae


def latent_crops(
    rng: Generator, model: ModelConfig, pool: Pool, rows: NDArray[np.int64], count: int, side: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Crops of some scenes' first latent frames, ``[B, 16, F, S/8, S/8]``, with pixels and weights as in `crops`."""
    video, cut_wh = model.video, cut_size(model, side)
    frames = 1 + TEMPORAL_STRIDE * (count - 1)
    latents, clips = [], []
    for row in rows:
        scene = pool.scenes[row]
        cells = [at // SPATIAL_STRIDE for at in corner(rng, scene, int(rng.integers(frames)), video.frames, cut_wh)]
        x, y = (SPATIAL_STRIDE * cell for cell in cells)
        size = tuple(extent // SPATIAL_STRIDE for extent in cut_wh[::-1])
        latents.append(window(pool.latents[row][:, :count], (cells[1], cells[0]), size))
        clips.append(render(scene, video.frames, range(frames))[:, y : y + cut_wh[1], x : x + cut_wh[0]])
    return (torch.stack(latents).float(), *weighted(clips))


def decoder_of(vae: VAE) -> nn.Module:
    """The layers that turn latents into pixels."""
    return nn.ModuleList([vae.conv2, vae.decoder])
