"""The style: shapes are drawn as outlines.

Letters: H W rows and columns.
"""

from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from tools.tinywan import scenes
from wanforge.runtime.measure.quality.figures import SHAPES, Field

BAND = 0.42
"""The width of an outline as a share of the radius. A ring is an outline already, and stays as it is."""


def outline(shape: str, centre_xy: tuple[float, float], radius: float, size_wh: tuple[int, int]) -> Field:
    """How much of each pixel an outlined shape covers; takes the place of `figures.coverage`."""
    width, height = size_wh
    x_HW = (np.arange(width) + 0.5 - centre_xy[0])[None, :] / radius
    y_HW = (np.arange(height) + 0.5 - centre_xy[1])[:, None] / radius
    distance_HW = SHAPES[shape](x_HW, y_HW)
    return np.clip(0.5 - radius * np.maximum(distance_HW, -(distance_HW + BAND)), 0, 1)


outlined = patch.object(scenes, "coverage", outline)
"""Inside this context, scenes are drawn in the style."""


def filling(frames_THWC: NDArray[np.uint8], contrast: float = 45.0) -> float:
    """The share of a clip's frames in which the middle of its thing is filled: 1 for filled shapes, 0 for outlines.

    The middle is the centre of the pixels that differ from the background, which is the colour of the corner.
    """
    filled = []
    for frame in frames_THWC.astype(np.float64):
        thing_HW = np.linalg.norm(frame - frame[0, 0], axis=-1) > contrast
        rows, columns = np.nonzero(thing_HW)
        if len(rows):
            filled.append(bool(thing_HW[round(rows.mean()), round(columns.mean())]))
    return float(np.mean(filled)) if filled else float("nan")
