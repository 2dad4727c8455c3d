"""What TinyWan draws: colours, shapes, directions and speeds by name, and shapes as signed distances.

Letters: H W rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "yellow": (225, 215, 40),
    "green": (40, 190, 50),
    "cyan": (40, 200, 215),
    "blue": (45, 65, 225),
    "purple": (190, 50, 205),
}
"""RGB by name, sixty degrees of hue apart, so that the hue alone identifies a colour."""

DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
"""Steps along x and y by name; y grows downwards."""

SPEEDS: dict[str, float] = {"slowly": 0.9, "": 1.8, "quickly": 2.8}
"""Pixels per frame by adverb."""

SPEED_BORDERS = (1.35, 2.3)
"""Pixels per frame that separate slow from ordinary, and ordinary from quick."""

RING_HOLE = 0.5
"""A ring's inner radius divided by its outer radius."""


def circle(x_HW: Field, y_HW: Field) -> Field:
    return np.hypot(x_HW, y_HW) - 1


def square(x_HW: Field, y_HW: Field) -> Field:
    return np.maximum(np.abs(x_HW), np.abs(y_HW)) - 0.9


def triangle(x_HW: Field, y_HW: Field) -> Field:
    """An upright equilateral triangle around its centroid."""
    inner = 0.62
    slope = 3**0.5 / 2 * np.abs(x_HW) - 0.5 * y_HW
    return np.maximum(slope, y_HW) - inner


def ring(x_HW: Field, y_HW: Field) -> Field:
    middle, half = (1 + RING_HOLE) / 2, (1 - RING_HOLE) / 2
    return np.abs(np.hypot(x_HW, y_HW) - middle) - half


SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "ring": ring,
}
"""Signed distance from the outline, negative inside, of a shape with a radius of about one at the origin."""

AREAS: dict[str, float] = {
    "circle": np.pi,
    "square": 1.8**2,
    "triangle": 3 * 3**0.5 * 0.62**2,
    "ring": np.pi * (1 - RING_HOLE**2),
}
"""The areas of these shapes."""


def coverage(shape: str, centre_xy: tuple[float, float], radius: float, size_wh: tuple[int, int]) -> Field:
    """How much of each pixel a shape covers, 0 to 1, ``[H, W]``: smooth over one pixel at the outline."""
    width, height = size_wh
    x_HW = (np.arange(width) + 0.5 - centre_xy[0])[None, :] / radius
    y_HW = (np.arange(height) + 0.5 - centre_xy[1])[:, None] / radius
    return np.clip(0.5 - radius * SHAPES[shape](x_HW, y_HW), 0, 1)


@dataclass(frozen=True)
class Subject:
    """One thing that a prompt asks for.

    Attributes:
        speed: An adverb of `SPEEDS`; empty where the prompt gives none.
    """

    colour: str
    shape: str
    direction: str
    speed: str = ""


def is_held_out(subject: Subject) -> bool:
    """Whether a combination is left out of training. A quarter of them are, chosen so that every pair of colour and
    shape, colour and direction, and shape and direction remains."""
    places = (
        list(COLOURS).index(subject.colour),
        list(SHAPES).index(subject.shape),
        list(DIRECTIONS).index(subject.direction),
    )
    return sum(places) % 4 == 0


def held_out_subjects() -> list[Subject]:
    """The 24 combinations that are left out, without a speed."""
    every = (Subject(*names) for names in product(COLOURS, SHAPES, DIRECTIONS))
    return [subject for subject in every if is_held_out(subject)]
