"""The pool: scenes and their latents, drawn and encoded once, so that training the denoiser repeats neither.

A scene is wider than a frame: each of its windows on the latent grid is a clip with the same caption. Shard ``i`` of a
seed holds the same scenes whichever process makes it, so several processes can fill the pool at the same time.

Letters: C channels, F H W latent frames, rows, columns; Y X rows and columns of a window's corner.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tools.tinywan.scenes import Scene, draw_scene, render
from wanforge.configs.model import ModelConfig
from wanforge.runtime.reference.vae import VAE

SHARD = 64
"""Scenes, or shots, per file."""
THING = 0.8
"""RMS distance over channels between the latents of a cell and the background, above which the cell shows a thing."""


def fill_pool(model: ModelConfig, vae: VAE, folder: Path, shards: range, seed: int = 0) -> Iterator[Path]:
    """Encode the scenes of those shards that do not exist yet, and yield their files."""

    def made(shard: int) -> tuple[list[Scene], dict[str, Tensor]]:
        scenes = scenes_of(model, seed, shard)
        return scenes, {str(place): encode(model, vae, scene).half() for place, scene in enumerate(scenes)}

    return fill_shards(folder, shards, made)


def fill_shards(
    folder: Path, shards: range, made: Callable[[int], tuple[Sequence[Any], dict[str, Tensor]]]
) -> Iterator[Path]:
    """Write those shards that do not exist yet, and yield their files.

    Args:
        made: Makes what a shard shows, as records, and the tensors of its file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        path = folder / f"{shard:05}.safetensors"
        if path.exists():
            continue
        shown, tensors = made(shard)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        path.with_suffix(".json").write_text(json.dumps([asdict(each) for each in shown]))
        partial.replace(path)
        yield path


def scenes_of(model: ModelConfig, seed: int, shard: int) -> list[Scene]:
    rng, video = np.random.default_rng([seed, shard]), model.video
    return [draw_scene(rng, video.size_wh, video.frames) for _ in range(SHARD)]


@torch.no_grad()
def encode(model: ModelConfig, vae: VAE, scene: Scene) -> Tensor:
    """The latents of a whole scene ``[C, F, H, W]``, float32."""
    return vae.encode(quick(pixels_of(model, scene).to(vae.conv1.weight.device)))[0].float().cpu()


def quick(x_BCTHW: Tensor) -> Tensor:
    """Convert to bfloat16 and to the memory layout in which convolutions are fastest on a CPU."""
    return x_BCTHW.bfloat16().contiguous(memory_format=torch.channels_last_3d)


def pixels_of(model: ModelConfig, scene: Scene) -> Tensor:
    """A whole scene as pixels in [-1, 1], ``[1, 3, T, H, W]``."""
    return torch.from_numpy(render(scene, model.video.frames)).permute(3, 0, 1, 2)[None] / 127.5 - 1


def frames_of_pixels(pixels_BCTHW: Tensor) -> NDArray[np.uint8]:
    """The frames ``[T, H, W, 3]`` of the first clip, from pixels in [-1, 1]."""
    frames: NDArray[np.uint8] = ((pixels_BCTHW[0] + 1) * 127.5 + 0.5).byte().permute(1, 2, 3, 0).numpy()
    return frames


def window(scene_CFHW: Tensor, corner_yx: tuple[int, int], shape_CFHW: tuple[int, ...]) -> Tensor:
    """The window of a scene whose first cell is at the given corner."""
    (y, x), (height, width) = corner_yx, shape_CFHW[-2:]
    return scene_CFHW[:, :, y : y + height, x : x + width]


def centre(scene_CFHW: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """The window of this size in the middle of a scene."""
    y, x = ((extent - size) // 2 for extent, size in zip(scene_CFHW.shape[2:], size_hw, strict=True))
    return window(scene_CFHW, (y, x), size_hw)


def middle(scene_CFHW: Tensor, frame_hw: tuple[int, int], side: int) -> Tensor:
    """The part of a scene in which every window of `side` cells shows its things, or most of their movement.

    A scene exceeds a frame by the space that its things leave free in a frame. This part exceeds a window by the space
    that they leave free in a window, and by at least one cell.
    """
    extents = scene_CFHW.shape[2:]
    taken = [2 * frame - extent for extent, frame in zip(extents, frame_hw, strict=True)]
    height, width = (min(extent, side + max(1, side - thing)) for extent, thing in zip(extents, taken, strict=True))
    return centre(scene_CFHW, (height, width))


def nearest_window(scene_CFHW: Tensor, state_CFHW: Tensor, signal: float) -> Tensor:
    """The window of a scene that, scaled by `signal`, has the least squared distance to a state."""
    likeness_YX = sums(scene_CFHW, state_CFHW)
    square_YX = sums(scene_CFHW.square().sum(0), torch.ones_like(state_CFHW[0]))
    merit_YX = likeness_YX - signal / 2 * square_YX
    return window(scene_CFHW, divmod(int(merit_YX.argmax()), merit_YX.shape[1]), state_CFHW.shape)


def sums(scene: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over each window of a scene; both tensors have the same axes before the last two."""
    one, other = (x.reshape(1, -1, *x.shape[-2:]) for x in (scene, weights))
    return F.conv2d(one, other)[0, 0]


def is_thing(clean_CFHW: Tensor) -> Tensor:
    """Which cells ``[..., F, H, W]`` show something other than the background, which fills most of every frame."""
    background = clean_CFHW.flatten(-2).median(-1).values[..., None, None]
    return (clean_CFHW - background).square().mean(-4).sqrt() > THING


class Pool:
    """The scenes of some shards and their latents, in float16. Shards that are still being made are added once they
    exist; training is reproducible bit for bit only with a pool that was complete from the start."""

    def __init__(self, folder: Path, shards: range) -> None:
        self.awaited = [folder / f"{shard:05}.safetensors" for shard in shards]
        self.scenes: list[Scene] = []
        self.latents: list[Tensor] = []
        self.refresh()

    def refresh(self) -> None:
        here = [path for path in self.awaited if path.exists()]
        self.awaited = [path for path in self.awaited if path not in here]
        for path in here:
            self.scenes += msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=list[Scene])
            latents = load_file(path)
            self.latents += [latents[str(place)] for place in range(len(latents))]
