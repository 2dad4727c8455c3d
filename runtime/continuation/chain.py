"""Several clips in one: each begins with the last frame of the one before.

An image-to-video model knows one frame of what came before it, so it keeps what things look like and where they are,
but not how they moved.

Letters: T frames, H W rows and columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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


@dataclass
class Passed:
    """What is kept of a part of a video whose frames went by.

    Attributes:
        frame: The number of its first frame.
        across: The difference between its first frame and the one before; None for the first part.
        inside: The differences between its neighbouring frames.
    """

    frame: int
    across: float | None = None
    inside: list[float] = field(default_factory=list)


class Seams:
    """Measures the seams of a video while its frames go by, of which it keeps only the last.

    Attributes:
        frames: The number of frames that went by.
        last: The last of them.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.last: Frame | None = None
        self._parts: list[Passed] = []

    def watch(self, part: Iterable[Frame]) -> Iterator[Frame]:
        """Yield the frames of the next part, which has at least one."""
        self._parts.append(Passed(self.frames))
        for frame in part:
            self._note(frame)
            yield frame

    def _note(self, frame: Frame) -> None:
        part, is_first = self._parts[-1], self.frames == self._parts[-1].frame
        if self.last is not None and is_first:
            part.across = difference(self.last, frame)
        elif self.last is not None:
            part.inside.append(difference(self.last, frame))
        self.last, self.frames = frame, self.frames + 1

    def found(self) -> list[Seam]:
        """The seams between the parts."""
        seams = []
        for before, part in pairwise(self._parts):
            inside = [*before.inside, *part.inside]
            seams.append(Seam(part.frame, part.across or 0.0, float(np.median(inside)) if inside else 0.0))
        return seams


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


def difference(one: Frame, other: Frame) -> float:
    """The RMS difference between two frames, in values from 0 to 255."""
    return float(np.sqrt(np.square(one.astype(np.float64) - other).mean()))
