"""A finished clip."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanforge.runtime.output.video import video_writer
from wanforge.runtime.request import Request, Timings


@dataclass(frozen=True, eq=False)
class Clip:
    """The result of a request.

    Attributes:
        request: What was asked for.
        frames: RGB, uint8 ``[T, H, W, 3]``.
        latents: The clean latents that the frames were decoded from, float64 ``[1, C, F, H, W]``.
        fps: Frames per second.
        timings: Seconds per stage, and per step of the denoiser.
        backend: Name of the backend that made it.
    """

    request: Request
    frames: NDArray[np.uint8]
    latents: Tensor
    fps: int
    timings: Timings
    backend: str

    def save(self, path: str | Path) -> Path:
        """Write the clip as an H.264 video; the file appears under its name when it is complete.

        Raises:
            RequestError: The name does not end in ``.mp4``, or is that of a folder.
            OSError: The file cannot be written there.
            ResourceError: The encoder failed, for example on a full disk.
        """
        target = Path(path)
        _, height, width, _ = self.frames.shape
        with video_writer(target, width, height, self.fps) as write:
            for frame in self.frames:
                write(torch.from_numpy(frame))
        return target
