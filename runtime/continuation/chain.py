"""Several clips in one: each begins with the last frame of the one before.

An image-to-video model knows one frame of what came before it, so it keeps what things look like and where they are,
but not how they moved.

Letters: T frames, H W rows and columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wanforge.configs.model import ModelConfig
from wanforge.errors import RequestError
from wanforge.progress import Progress, silent
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request

Frame = NDArray[np.uint8]
"""RGB ``[H, W, 3]``."""


@dataclass(frozen=True)
class Seam:
    """Where one clip goes on from another.

    Attributes:
        frame: The first frame after the seam, counted from 0.
        across: RMS difference between the frames on either side, in values from 0 to 255.
        inside: The median RMS difference between neighbouring frames in the two clips.
    """

    frame: int
    across: float
    inside: float


def check_continuable(model: ModelConfig) -> None:
    """Refuse models that cannot begin with a given frame.

    Raises:
        RequestError: It is a text-to-video model.
    """
    if not model.takes_image:
        raise RequestError(
            f"{model.name} makes clips from text alone; to continue a clip, give a bundle of an "
            "image-to-video model, such as tinywan-i2v"
        )


def continued(
    pipeline: Pipeline, requests: Sequence[Request], first: Image.Image, progress: Progress = silent
) -> Iterator[list[Frame]]:
    """Make one clip after the other, and yield the frames that each adds.

    The first frame of each clip is the last of the one before, as the model sees it, and is left out. The frames go
    from one clip to the next without a video's loss.

    Args:
        requests: The requests in order; their images are set here.
        first: The frame from which the first clip goes on.

    Raises:
        RequestError, ConfigError, ResourceError, BundleError: See `Pipeline.check`.
    """
    check_continuable(pipeline.model)
    last = first
    for request in requests:
        frames = pipeline.make(replace(request, image=last), progress).frames
        last = Image.fromarray(frames[-1])
        yield list(frames[1:])


def seams_of(parts: Iterable[Sequence[Frame]]) -> list[Seam]:
    """Measure the seams between parts of a clip, each of which has at least one frame."""
    seams, place, before = list[Seam](), 0, list[Frame]()
    for part in parts:
        if before:
            inside = [*differences(before), *differences(part)]
            seams.append(Seam(place, difference(before[-1], part[0]), float(np.median(inside)) if inside else 0.0))
        place, before = place + len(part), list(part)
    return seams


def differences(frames: Sequence[Frame]) -> list[float]:
    """The RMS differences between neighbouring frames."""
    return [difference(one, other) for one, other in pairwise(frames)]


def difference(one: Frame, other: Frame) -> float:
    """The RMS difference between two frames, in values from 0 to 255."""
    return float(np.sqrt(np.square(one.astype(np.float64) - other).mean()))
