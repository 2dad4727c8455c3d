"""Reads colour, shape, direction and speed off a clip's frames, by arithmetic alone.

A pixel that differs from its row's background belongs to a thing, and its hue says to which one. The path of a thing's
centre gives its direction and speed; its overlap with drawn shapes of the same area gives its shape.

Letters: T frames, C channels, H W rows and columns.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanforge.runtime.measure.quality.figures import (
    AREAS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SPEED_BORDERS,
    SPEEDS,
    Subject,
    coverage,
)

CONTRAST = 45.0
"""Distance in RGB from the background above which a pixel belongs to a thing."""
CHROMA = 40.0
"""Difference between the largest and the smallest channel above which a pixel has a hue."""
FEWEST = 3
"""Fewest coloured pixels in the 3x3 square around a pixel, itself included, for it to count."""
LEAST_AREA = 40.0
"""Fewest pixels per frame that make a thing."""
LEAST_SHARE = 0.2
"""Smallest share of all coloured pixels that makes a thing."""
LEAST_STEP = 0.4
"""Pixels per frame below which a thing stands still."""

Pixels = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Sighting:
    """One thing in a clip.

    Attributes:
        direction: ``still`` where it hardly moves.
        step_xy: Pixels per frame along x and y.
        area: Pixels per frame.
    """

    colour: str
    shape: str
    direction: str
    step_xy: tuple[float, float]
    area: float

    @property
    def speed(self) -> str:
        """Its adverb in `SPEEDS`."""
        pace = max(abs(part) for part in self.step_xy)
        return list(SPEEDS)[sum(pace > border for border in SPEED_BORDERS)]


@dataclass(frozen=True)
class ClipReading:
    """What a clip shows: its things, the largest first."""

    things: tuple[Sighting, ...]


@dataclass(frozen=True)
class Score:
    """Which properties of one subject are right; speed is None where the prompt gives none."""

    colour: bool
    shape: bool
    direction: bool
    speed: bool | None


def read(frames_TCHW: NDArray[np.uint8]) -> ClipReading:
    """Read a clip.

    Args:
        frames_TCHW: RGB, at least two frames.
    """
    pixels = frames_TCHW.astype(np.float64).transpose(0, 2, 3, 1)
    coloured, contrast = shown_things(pixels)
    nearest = nearest_colour(pixels)
    total = max(1, int(coloured.sum()))
    things = []
    for index, colour in enumerate(COLOURS):
        mask = coloured & (nearest == index)
        area = mask.sum() / len(pixels)
        if area >= LEAST_AREA and mask.sum() >= LEAST_SHARE * total:
            things.append(sight(colour, mask, contrast))
    return ClipReading(tuple(sorted(things, key=lambda thing: -thing.area)))


def shown_things(pixels_THWC: Pixels) -> tuple[NDArray[np.bool_], Pixels]:
    """Which pixels belong to things, and how far each pixel is from its row's background, ``[T, H, W]``."""
    background_H1C = np.median(pixels_THWC, (0, 2))[:, None]
    contrast = np.linalg.norm(pixels_THWC - background_H1C, axis=-1)
    return without_specks((contrast > CONTRAST) & (np.ptp(pixels_THWC, -1) > CHROMA)), contrast


def without_specks(mask_THW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Remove nearly isolated pixels, which come from noise; even a triangle's tips have more neighbours."""
    height, width = mask_THW.shape[1:]
    padded = np.pad(mask_THW, ((0, 0), (1, 1), (1, 1))).astype(np.int8)
    around = sum(padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3))
    return mask_THW & (around >= FEWEST)


def nearest_colour(pixels: Pixels) -> NDArray[np.int64]:
    """Index of the colour with the nearest hue, for each pixel."""
    palette = hue_vector(np.array(list(COLOURS.values()), np.float64))
    palette /= np.linalg.norm(palette, axis=-1, keepdims=True)
    return np.argmax(hue_vector(pixels) @ palette.T, -1)


def hue_vector(rgb: Pixels) -> Pixels:
    """Hue as a direction in the plane across the grey axis, ``[..., 2]``."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.stack((red - (green + blue) / 2, 3**0.5 / 2 * (green - blue)), -1)


def sight(colour: str, mask_THW: NDArray[np.bool_], contrast_THW: Pixels) -> Sighting:
    """Follow one colour through the clip."""
    full = np.median(contrast_THW[mask_THW])
    # A pixel on an outline counts by the share of it that is covered.
    cover_THW = np.clip(contrast_THW / full, 0, 1) * mask_THW
    areas = cover_THW.sum((1, 2))
    seen = areas > 0.5 * np.median(areas[areas > 0])
    border = mask_THW[:, [0, -1]].any((1, 2)) | mask_THW[:, :, [0, -1]].any((1, 2))
    inside = seen & ~border
    chosen = np.flatnonzero(inside if inside.sum() >= 3 else seen)
    height, width = mask_THW.shape[1:]
    x_T = (cover_THW.sum(1) @ (np.arange(width) + 0.5))[chosen] / areas[chosen]
    y_T = (cover_THW.sum(2) @ (np.arange(height) + 0.5))[chosen] / areas[chosen]
    step = (slope(chosen, x_T), slope(chosen, y_T))
    overlaps = {
        shape: np.mean(
            [overlap(shape, cover_THW[t], (x, y), areas[t]) for t, x, y in zip(chosen, x_T, y_T, strict=True)]
        )
        for shape in SHAPES
    }
    return Sighting(colour, max(overlaps, key=lambda s: overlaps[s]), direction_of(step), step, float(areas.mean()))


def slope(frames: NDArray[np.int64], values: Pixels) -> float:
    """Slope, in pixels per frame, of the straight line through a thing's centres."""
    return float(np.polyfit(frames, values, 1)[0]) if len(frames) > 1 else 0.0


def direction_of(step_xy: tuple[float, float]) -> str:
    """The direction in which a thing moves most, or ``still``."""
    if max(abs(part) for part in step_xy) < LEAST_STEP:
        return "still"
    return max(DIRECTIONS, key=lambda name: np.dot(DIRECTIONS[name], step_xy))


def overlap(shape: str, cover_HW: Pixels, centre_xy: tuple[float, float], area: float) -> float:
    """Intersection over union with a drawn shape of the same area and centre."""
    drawn = coverage(shape, centre_xy, (area / AREAS[shape]) ** 0.5, (cover_HW.shape[1], cover_HW.shape[0]))
    return float(np.minimum(cover_HW, drawn).sum() / np.maximum(cover_HW, drawn).sum())


def score(reading: ClipReading, subjects: tuple[Subject, ...]) -> tuple[Score, ...]:
    """Compare a clip with what was asked for, subject by subject.

    A subject is compared with the thing of its colour or, where none exists, with the largest remaining thing whose
    colour no subject asks for.
    """
    asked = {subject.colour for subject in subjects}
    by_colour = {thing.colour: thing for thing in reading.things}
    spare = [thing for thing in reading.things if thing.colour not in asked]
    scores = []
    for subject in subjects:
        thing = by_colour.get(subject.colour) or (spare.pop(0) if spare else None)
        if thing is None:
            scores.append(Score(False, False, False, False if subject.speed else None))
            continue
        scores.append(
            Score(
                thing.colour == subject.colour,
                thing.shape == subject.shape,
                thing.direction == subject.direction,
                thing.speed == subject.speed if subject.speed else None,
            )
        )
    return tuple(scores)
