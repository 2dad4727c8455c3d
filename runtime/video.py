"""Writing frames as an mp4 file, completely or not at all."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import imageio_ffmpeg
from torch import Tensor

from wanforge.errors import RequestError, ResourceError

RATE_FACTOR = 25
"""Constant rate factor of x264, 0 to 51, lower is better; the one that upstream's writer uses (imageio's quality 5)."""


class FrameSink(Protocol):
    """Called with one frame after the other, uint8 ``[H, W, 3]``."""

    def __call__(self, frame: Tensor) -> object: ...


def partial_path(path: Path) -> Path:
    """The temporary name of a video until it is complete."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def check_place(path: Path) -> None:
    """Make the folder of a video and check that the video can be written there, before it is made.

    Raises:
        RequestError: The name does not end in ``.mp4``, or is that of a folder.
        OSError: The file cannot be written.
    """
    if path.suffix.lower() != ".mp4":
        raise RequestError(f"{path}: videos are written as .mp4 files; give a name that ends in .mp4")
    if path.is_dir():
        raise RequestError(f"{path}: is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path(path).touch()
    partial_path(path).unlink()


@contextmanager
def video_writer(path: Path, width_px: int, height_px: int, fps: int) -> Iterator[FrameSink]:
    """Write an H.264 video under a temporary name; `path` appears when the block ends and the encoder has reported
    that all of it is written.

    Raises:
        RequestError, OSError: The video cannot be written there, see `check_place`.
        ResourceError: The encoder stopped or failed, for example on a full disk.
    """
    check_place(path)
    partial = partial_path(path)
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width_px}x{height_px}", "-r", str(fps), "-i", "-"]
    target = ["-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", str(RATE_FACTOR), "-v", "error", str(partial)]
    # The messages of ffmpeg go to a file: a pipe that is not read would fill up and stop it.
    with tempfile.TemporaryFile() as said:
        encoder = subprocess.Popen(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-y", *source, *target],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        assert encoder.stdin is not None
        write = encoder.stdin.write
        try:
            try:
                yield lambda frame: write(frame.numpy().tobytes())
                encoder.stdin.close()
                is_fed = True
            except BrokenPipeError:
                is_fed = False  # the encoder has ended, and its messages say why
            if encoder.wait() or not is_fed:
                said.seek(0)
                raise failure(path, said.read().decode(errors="replace"))
            partial.replace(path)
        finally:
            encoder.kill()
            encoder.wait()
            with suppress(BrokenPipeError):
                encoder.stdin.close()
            partial.unlink(missing_ok=True)


def failure(path: Path, said: str) -> ResourceError:
    """The error for an encoder that stopped, with its last messages and the free space on the disk."""
    free = shutil.disk_usage(path.parent).free
    words = " ".join(said.split()[-40:]) or "nothing"
    return ResourceError(
        f"{path}: the video encoder stopped; it said: {words}. {free / 1e6:.1f} MB are free on that disk"
    )
