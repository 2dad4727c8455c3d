"""Reading the videos that tests have written."""

import warnings
from pathlib import Path

import imageio_ffmpeg
import torch


def read_video(path: Path) -> tuple[dict[str, object], torch.Tensor]:
    """A video's properties and its frames, uint8 ``[F, H, W, 3]``."""
    with warnings.catch_warnings():
        # If ffmpeg has exited before the last frame is read, imageio-ffmpeg leaves its pipes open.
        warnings.simplefilter("ignore", ResourceWarning)
        reader = imageio_ffmpeg.read_frames(str(path))
        properties = next(reader)
        width, height = properties["size"]
        frames = [torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3) for frame in reader]
        del reader
    return properties, torch.stack(frames)
