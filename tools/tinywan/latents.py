"""The pool: scenes and their latents, drawn and encoded once, so that training the denoiser pays for neither.

Shard ``i`` of a seed holds the same scenes whoever makes it, so several processes may fill the pool side by side.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.tinywan.scenes import Scene, draw_scene, render
from wanforge.configs.schema import ModelConfig
from wanforge.runtime.reference.vae import VAE

SHARD = 128
"""Scenes per file."""


def fill_pool(model: ModelConfig, vae: VAE, folder: Path, shards: range, seed: int = 0) -> Iterator[Path]:
    """Encode the scenes of these shards that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        path = folder / f"{shard:05}.safetensors"
        if path.exists():
            continue
        scenes = scenes_of(model, seed, shard)
        latents = torch.cat([encode(model, vae, scene) for scene in scenes])
        partial = path.with_suffix(".partial")
        save_file({"latents": latents.half()}, partial)
        path.with_suffix(".json").write_text(json.dumps([asdict(scene) for scene in scenes]))
        partial.replace(path)
        yield path


def scenes_of(model: ModelConfig, seed: int, shard: int) -> list[Scene]:
    rng = np.random.default_rng([seed, shard])
    return [draw_scene(rng, (model.video.width_px, model.video.height_px)) for _ in range(SHARD)]


@torch.no_grad()
def encode(model: ModelConfig, vae: VAE, scene: Scene) -> Tensor:
    """A scene's latents ``[1, 16, F, H, W]``, float32."""
    pixels = pixels_of(model, scene).bfloat16().contiguous(memory_format=torch.channels_last_3d)
    return vae.encode(pixels.to(vae.conv1.weight.device)).float().cpu()


def pixels_of(model: ModelConfig, scene: Scene) -> Tensor:
    """A scene as pixels in [-1, 1], ``[1, 3, T, H, W]``."""
    clip = render(scene, model.video.frames, (model.video.width_px, model.video.height_px))
    return torch.from_numpy(clip).permute(3, 0, 1, 2)[None] / 127.5 - 1


class Pool:
    """The scenes of some shards and their latents, float16. Shards that are still being made join when they are there;
    training is reproducible to the bit with a pool that was complete."""

    def __init__(self, folder: Path, shards: range) -> None:
        self.awaited = [folder / f"{shard:05}.safetensors" for shard in shards]
        self.scenes: list[Scene] = []
        self.latents = torch.empty(0)
        self.refresh()

    def refresh(self) -> None:
        here = [path for path in self.awaited if path.exists()]
        if not here:
            return
        self.awaited = [path for path in self.awaited if path not in here]
        for path in here:
            self.scenes += msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=list[Scene])
        known = [self.latents] if len(self.latents) else []
        self.latents = torch.cat([*known, *(load_file(path)["latents"] for path in here)])
