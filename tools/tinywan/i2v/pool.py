"""Shots, the latents of their clips and those of their first frames, drawn and encoded once.

Letters: B samples, C channels, F H W latent frames, rows, columns.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.tinywan.latents import SHARD, fill_shards, quick
from tools.tinywan.scenes import draw_subject
from wanforge.configs.model import ModelConfig
from wanforge.runtime.inputs.condition import MASK_CHANNELS, condition
from wanforge.runtime.measure.quality.shots import Shot, draw_shot, frames_of
from wanforge.runtime.reference.vae import VAE


def fill_pool(
    model: ModelConfig, vae: VAE, folder: Path, shards: int, *, workers: int = 1, seed: int = 0
) -> Iterator[Path]:
    """Encode the shots of those shards that do not exist yet, and yield their files."""

    def made(shard: int) -> tuple[list[Shot], dict[str, Tensor]]:
        rng, video = np.random.default_rng([seed, shard]), model.video
        shots = [draw_shot(rng, draw_subject(rng), video.size_wh, video.frames) for _ in range(SHARD)]
        # Threads that each encode a whole clip never wait for one another, as threads that share a convolution do.
        with ThreadPoolExecutor(workers) as pool:
            clips, given = zip(*pool.map(lambda shot: encode(model, vae, shot), shots), strict=True)
        return shots, {"clips": torch.cat(clips).half(), "given": torch.cat(given).half()}

    return fill_shards(folder, range(shards), made)


@torch.no_grad()
def encode(model: ModelConfig, vae: VAE, shot: Shot) -> tuple[Tensor, Tensor]:
    """The latents of a clip ``[1, 16, F, H, W]``, and the 20 channels with which its first frame conditions the
    denoiser, both float32."""
    video = model.video
    frames = torch.from_numpy(frames_of(shot, video.size_wh, video.frames))
    pixels = frames.permute(3, 0, 1, 2)[None] / 127.5 - 1
    still = torch.zeros_like(pixels)
    still[:, :, 0] = frames[0].round().permute(2, 0, 1) / 127.5 - 1
    clip, first = (vae.encode(quick(x)).float() for x in (pixels, still))
    return clip, condition(first)


class ShotPool:
    """The shots of all shards in a folder and their latents, in float16."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("*.safetensors"))
        files = [load_file(path) for path in paths]
        self.clips, self.given = (torch.cat([file[name] for file in files]) for name in ("clips", "given"))
        self.grey = self.given[:, MASK_CHANNELS:, -1].float().mean((0, 2, 3))
        """The latents of grey frames ``[C]``."""
        self.shots: list[Shot] = []
        for path in paths:
            self.shots += msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=list[Shot])
