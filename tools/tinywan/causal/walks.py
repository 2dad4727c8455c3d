"""What TinyWan's causal model is shown: a shape that walks over a plain background and follows what it is told.

A walk has three legs, each with a caption of its own. Where one leg ends, the shape goes on from where it is, with the
colour, shape, size, direction and speed of the next one. What leaves the frame on one side comes in on the other, so a
walk can go on for ever. A caption and the frames before it describe exactly one continuation.

Letters: B samples, C channels, F latent frames, H W rows and columns, T frames of a clip.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from tools.tinywan.latents import SHARD, fill_shards, quick
from tools.tinywan.scenes import BACKGROUNDS, SIZES, Scene, Thing, draw_subject
from wanforge.configs.clip import SPATIAL_STRIDE, TEMPORAL_STRIDE, latent_frames
from wanforge.configs.model import ModelConfig
from wanforge.runtime.measure.quality.figures import COLOURS, DIRECTIONS, SPEEDS, Subject, coverage, is_held_out
from wanforge.runtime.reference.vae import VAE

LEGS = 3
"""Legs of a walk."""
APPROACH = 10
"""Frames after which a walk that begins as a new video does is in the middle of the frame, as in TinyWan's clips."""
REDRAWN = 0.5
"""Share of the changes that replace everything but the background; the others replace one property."""
REPAINTED = 0.15
"""Share of the changes after which the background is another one."""
MARGIN = 2
"""Latent cells around a frame that are encoded as well and cut away: the frame's border is nothing special to a walk,
and is to the VAE."""


@dataclass(frozen=True)
class Leg:
    """A part of a walk, as its caption says.

    Attributes:
        size: A key of `SIZES`.
        background: A key of `BACKGROUNDS`.
    """

    subject: Subject
    size: str
    background: str

    @property
    def step_xy(self) -> NDArray[np.float64]:
        """Pixels per frame along x and y."""
        return SPEEDS[self.subject.speed] * np.array(DIRECTIONS[self.subject.direction], np.float64)

    @property
    def scene(self) -> Scene:
        """The leg as `scenes.caption` describes it; where its thing is does not matter there."""
        return Scene((Thing(self.subject, self.size, (0.0, 0.0)),), self.background, (0, 0))


@dataclass(frozen=True)
class Walk:
    """A shape's walk.

    Attributes:
        begins: The latent frame with which each leg begins.
        start_xy: The shape's centre in the first frame, in pixels.
        is_new: Whether it begins where a new video does: so that, going straight on, it is in the middle of the frame
            after `APPROACH` frames.
    """

    legs: tuple[Leg, ...]
    begins: tuple[int, ...]
    start_xy: tuple[float, float]
    is_new: bool

    def leg_of(self, latent_frame: int) -> int:
        """The number of the leg at a latent frame."""
        return sum(begin <= latent_frame for begin in self.begins) - 1


def draw_walk(rng: Generator, frame_wh: tuple[int, int], frames: int) -> Walk:
    """Draw a walk of trained combinations of colour, shape and direction."""
    legs = [Leg(draw_subject(rng), str(rng.choice(list(SIZES))), str(rng.choice(list(BACKGROUNDS))))]
    while len(legs) < LEGS:
        legs.append(changed(rng, legs[-1]))
    turns = 1 + np.sort(rng.choice(latent_frames(frames) - 1, LEGS - 1, replace=False))
    begins = (0, *(int(turn) for turn in turns))
    is_new = bool(rng.random() < 0.5)
    x, y = beginning(legs[0], frame_wh) if is_new else rng.uniform((0, 0), frame_wh)
    return Walk(tuple(legs), begins, (float(x), float(y)), is_new)


def draw_first(rng: Generator, frame_wh: tuple[int, int]) -> Walk:
    """Draw a walk of one leg that begins as a new video does, of which only the first frame is shown."""
    leg = Leg(draw_subject(rng), str(rng.choice(list(SIZES))), str(rng.choice(list(BACKGROUNDS))))
    x, y = beginning(leg, frame_wh)
    return Walk((leg,), (0,), (float(x), float(y)), is_new=True)


def beginning(leg: Leg, frame_wh: tuple[int, int]) -> NDArray[np.float64]:
    """Where a shape is in the first frame of a new video, in pixels."""
    place: NDArray[np.float64] = np.array(frame_wh) / 2 - APPROACH * leg.step_xy
    return place


def changed(rng: Generator, leg: Leg) -> Leg:
    """The leg after another one."""
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < REPAINTED else leg.background
    if rng.random() < REDRAWN:
        return Leg(draw_subject(rng), str(rng.choice(list(SIZES))), background)
    while True:
        name = str(rng.choice(["colour", "shape", "direction", "direction", "speed"]))
        subject = replace(leg.subject, **{name: getattr(draw_subject(rng), name)})
        if subject != leg.subject and not is_held_out(subject):
            return Leg(subject, leg.size, background)


def render(walk: Walk, frame_wh: tuple[int, int], frames: int, margin: int = 0) -> NDArray[np.float32]:
    """The frames of a walk, 0 to 255, ``[T, H, W, 3]``.

    Args:
        margin: Pixels around the frame that are shown as well; what is seen there is what comes in from the other side.
    """
    (width, height), place, clip = frame_wh, np.array(walk.start_xy), []
    wide = (width + 2 * margin, height + 2 * margin)
    for frame in range(frames):
        leg = walk.legs[walk.leg_of(-(-frame // TEMPORAL_STRIDE))]
        place = (place + leg.step_xy * (frame > 0)) % frame_wh
        cover = np.zeros(wide[::-1])
        for x in (-width, 0, width):
            for y in (-height, 0, height):
                centre = (place[0] + x + margin, place[1] + y + margin)
                cover = np.maximum(cover, coverage(leg.subject.shape, centre, SIZES[leg.size], wide))
        shown = np.full((*wide[::-1], 3), float(BACKGROUNDS[leg.background]))
        clip.append(shown + cover[..., None] * (np.array(COLOURS[leg.subject.colour]) - shown))
    return np.stack(clip).astype(np.float32)


def fill_pool(model: ModelConfig, vae: VAE, folder: Path, shards: int, seed: int = 0) -> Iterator[Path]:
    """Draw and encode the walks of those shards that do not exist yet, and yield their files."""

    def made(shard: int) -> tuple[list[Walk], dict[str, Tensor]]:
        rng, video = np.random.default_rng([11, seed, shard]), model.video
        walks = [draw_walk(rng, video.size_wh, video.frames) for _ in range(SHARD)]
        latents = [encode(vae, walk, video.size_wh, video.frames) for walk in walks]
        return walks, {"latents": torch.cat(latents).half()}

    return fill_shards(folder, range(shards), made)


def fill_firsts(model: ModelConfig, vae: VAE, folder: Path, shards: int, seed: int = 0) -> Iterator[Path]:
    """The same of first frames alone, of which walks show too few."""

    def made(shard: int) -> tuple[list[Walk], dict[str, Tensor]]:
        rng, size_wh = np.random.default_rng([12, seed, shard]), model.video.size_wh
        walks = [draw_first(rng, size_wh) for _ in range(SHARD)]
        return walks, {"latents": torch.cat([encode(vae, walk, size_wh, 1) for walk in walks]).half()}

    return fill_shards(folder, range(shards), made)


@torch.no_grad()
def encode(vae: VAE, walk: Walk, size_wh: tuple[int, int], frames: int) -> Tensor:
    """The latents of a walk ``[1, 16, F, H, W]``, float32, without any trace of the frame's border."""
    clip = torch.from_numpy(render(walk, size_wh, frames, MARGIN * SPATIAL_STRIDE))
    latents: Tensor = vae.encode(quick(clip.permute(3, 0, 1, 2)[None] / 127.5 - 1)).float()
    return latents[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


class WalkPool:
    """The walks of all shards in a folder and their latents ``[N, 16, F, H, W]``, in float16."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("*.safetensors"))
        self.latents = torch.cat([load_file(path)["latents"] for path in paths])
        self.walks: list[Walk] = []
        for path in paths:
            self.walks += msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=list[Walk])
