"""Frames in, mp4 out, whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import imageio_ffmpeg
from torch import Tensor

from wanforge.errors import ResourceError

QUALITY = 5
"""imageio's scale of 0 to 10; what upstream uses."""


class FrameSink(Protocol):
    """Takes one frame after the other, uint8 ``[H, W, 3]``."""

    def __call__(self, frame: Tensor) -> None: ...


@contextmanager
def video_writer(path: Path, width_px: int, height_px: int, fps: int) -> Iterator[FrameSink]:
    """Write an H.264 video under a temporary name; `path` appears when the block ends without an error.

    Raises:
        ResourceError: the encoder stopped, for example on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    encoder = imageio_ffmpeg.write_frames(
        str(partial),
        (width_px, height_px),
        fps=fps,
        codec="libx264",
        quality=QUALITY,
        macro_block_size=1,  # sizes are multiples of 16 anyway; imageio must not pad
        ffmpeg_log_level="error",
    )
    try:
        encoder.send(None)
        yield lambda frame: encoder.send(frame.numpy().tobytes())
        encoder.close()
        if not partial.exists() or not partial.stat().st_size:
            raise OSError("the encoder wrote nothing")
        partial.replace(path)
    except OSError:
        free = shutil.disk_usage(path.parent).free
        raise ResourceError(
            f"{path}: the video encoder stopped; {free / 1e6:.1f} MB are free on that disk. What it said stands above"
        ) from None
    finally:
        encoder.close()
        partial.unlink(missing_ok=True)
