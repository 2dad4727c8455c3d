"""What TinyWan's image-to-video model is shown: single shapes anywhere in a frame, of any size.

A caption says the motion. The image says where the shape is, how large it is and what lies behind it, and often its
colour and even which shape it is.

Letters: F frames, H W rows and columns.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from wanforge.runtime.measure.quality.figures import (
    COLOURS,
    DIRECTIONS,
    SPEEDS,
    Subject,
    coverage,
    held_out_subjects,
)

if TYPE_CHECKING:
    from PIL.Image import Image

TONES = (22, 128, 232)
"""The greys of backgrounds, 0 to 255."""
RADII = (14.0, 22.5)
"""The least and the largest radius, in pixels."""
MARGIN = 2.0
"""Least distance of a shape from the border of every frame, in pixels."""
WORDINGS = (
    "a {colour} {shape} moving {direction} {speed}",
    "a {shape} moving {direction} {speed}",
    "moving {direction} {speed}",
)


@dataclass(frozen=True)
class Shot:
    """A shape that moves evenly over a plain background, and all that can be seen of it.

    Attributes:
        subject: What it is called and how it moves.
        tone: The grey of the background, 0 to 255.
        radius: In pixels.
        start_xy: Its centre in the first frame, in pixels.
    """

    subject: Subject
    tone: int
    radius: float
    start_xy: tuple[float, float]

    def centre(self, frame: int) -> tuple[float, float]:
        """Its centre in a frame."""
        way, (dx, dy) = frame * SPEEDS[self.subject.speed], DIRECTIONS[self.subject.direction]
        return (self.start_xy[0] + way * dx, self.start_xy[1] + way * dy)

    def bounds(self, frames: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """The least and the largest x and y, in pixels, that it reaches in a clip."""
        (x, y), (last_x, last_y) = self.start_xy, self.centre(frames - 1)
        low = (min(x, last_x) - self.radius, min(y, last_y) - self.radius)
        return low, (max(x, last_x) + self.radius, max(y, last_y) + self.radius)


def draw_shot(rng: Generator, subject: Subject, frame_wh: tuple[int, int], frames: int) -> Shot:
    """Draw all that a subject leaves open, so that the shape stays inside the frame."""
    tone, radius = int(rng.choice(TONES)), float(rng.uniform(*RADII))
    way = (frames - 1) * SPEEDS[subject.speed] * np.array(DIRECTIONS[subject.direction])
    low = radius + MARGIN - np.minimum(0, way)
    high = np.array(frame_wh) - radius - MARGIN - np.maximum(0, way)
    x, y = rng.uniform(low, np.maximum(low, high))
    return Shot(subject, tone, radius, (float(x), float(y)))


def frames_of(shot: Shot, frame_wh: tuple[int, int], frames: int) -> NDArray[np.float32]:
    """The first frames of a shot, 0 to 255, ``[F, H, W, 3]``."""
    colour, clip = np.array(COLOURS[shot.subject.colour], np.float32), []
    for frame in range(frames):
        cover = coverage(shot.subject.shape, shot.centre(frame), shot.radius, frame_wh)[..., None].astype(np.float32)
        clip.append(shot.tone + cover * (colour - shot.tone))
    return np.stack(clip)


def still(shot: Shot, frame_wh: tuple[int, int]) -> "Image":
    """The first frame of a shot as a picture."""
    from PIL import Image  # here, because most commands that measure need no pictures

    return Image.fromarray(frames_of(shot, frame_wh, 1)[0].round().astype(np.uint8))


def held_out_shots(frame_wh: tuple[int, int], frames: int) -> list[tuple[str, Shot]]:
    """Captions and shots of the 24 combinations that are held out, at each speed: 72 in all, each wording for a third
    of them."""
    shots: list[tuple[str, Shot]] = []
    for subject in held_out_subjects():
        for turn, speed in enumerate(SPEEDS):
            asked = replace(subject, speed=speed)
            wording = WORDINGS[(turn + len(shots) // len(SPEEDS)) % len(WORDINGS)]
            rng = np.random.default_rng([7, len(shots)])
            shots.append((wording.format_map(vars(asked)).strip(), draw_shot(rng, asked, frame_wh, frames)))
    return shots
