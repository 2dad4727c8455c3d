"""Writing frames as an mp4 file, completely or not at all."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from wanforge.errors import RequestError, ResourceError
from wanforge.requirements import install_package
from wanforge.runtime.output.frame_queue import FrameQueue
from wanforge.whole_file import check_writable, temporary_file

RATE_FACTOR = 25
"""Constant rate factor of x264, 0 to 51, lower is better; the one that upstream's writer uses (imageio's quality 5)."""

THREADS = 4
"""Threads of x264. The number decides how it divides the work, and it writes the number into the file, so by default
the bytes of a video would depend on the processors that it may use."""

NOISE_BYTES_PER_PIXEL = 0.6
"""Bytes of a video of noise per pixel of every frame; 0.44 to 0.57 were measured (docs/log.md)."""


class VideoError(ResourceError):
    """A video could not be encoded or written."""


class FrameSink(Protocol):
    """Called with one frame after the other, uint8 ``[H, W, 3]``. The frames must not be changed afterwards."""

    def __call__(self, frame: Tensor) -> object: ...


def most_bytes(width_px: int, height_px: int, frames: int) -> int:
    """About the size of a video of noise, the largest that there can be."""
    return int(NOISE_BYTES_PER_PIXEL * frames * width_px * height_px)


def check_place(path: Path) -> None:
    """Make the folder of a video and check that the video can be written there, before it is made.

    Raises:
        RequestError: The name does not end in ``.mp4``, or is that of a folder or a device.
        OSError: The file cannot be written.
    """
    if path.suffix.lower() != ".mp4":
        raise RequestError(f"{path}: videos are written as .mp4 files; give a name that ends in .mp4")
    check_writable(path)


def check_encoder(path: Path, width_px: int, height_px: int, fps: int) -> None:
    """Encode one black frame beside the place of a video, to know beforehand that the encoder works.

    Raises:
        ResourceError: The encoder is missing or cannot be started.
        VideoError: It fails, for example because it lacks H.264 or because the disk is full.
        OSError: The file cannot be written.
    """
    size = width_px, height_px
    with temporary_file(path) as temporary, encoded(path, temporary, size, fps) as write:
        write(torch.zeros(height_px, width_px, 3, dtype=torch.uint8))


@contextmanager
def video_writer(path: Path, width_px: int, height_px: int, fps: int) -> Iterator[FrameSink]:
    """Write an H.264 video under a temporary name; `path` appears when the block ends and the encoder has reported
    that all of it is written. Frames are encoded while the block goes on.

    Raises:
        RequestError, OSError: The video cannot be written there, see `check_place`.
        ResourceError: The encoder cannot be started.
        VideoError: The encoder stopped or failed, for example on a full disk.
    """
    check_place(path)
    with temporary_file(path) as temporary:
        with encoded(path, temporary, (width_px, height_px), fps) as write:
            yield write
        temporary.replace(path)


@contextmanager
def encoded(path: Path, temporary: Path, size_wh: tuple[int, int], fps: int) -> Iterator[FrameSink]:
    """Encode frames into a temporary file, which is complete when the block ends. Errors name `path`."""
    size = f"{size_wh[0]}x{size_wh[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    target = ["-vcodec", "libx264", "-threads", str(THREADS), "-pix_fmt", "yuv420p", "-crf", str(RATE_FACTOR)]
    target += ["-v", "error", "-f", "mp4"]
    # Without ``file:``, ffmpeg would take what precedes a colon for a protocol.
    with fed([*source, *target, f"file:{temporary}"], partial(failure, path)) as frames:
        yield frames.put


@contextmanager
def fed(
    options: list[str], failed: Callable[[str], Exception], stdout: int = subprocess.DEVNULL
) -> Iterator[FrameQueue]:
    """Run the encoder while the block puts frames into a queue, which the encoder reads from its stdin.

    Args:
        failed: Returns the error for an encoder that stopped, given its last messages.
        stdout: The descriptor that it may write to.
    """
    # The messages of ffmpeg go to a file: a pipe that is not read would fill up and stop it.
    with tempfile.TemporaryFile() as said:
        encoder = started(options, said.fileno(), stdout)
        assert encoder.stdin is not None
        stdin = encoder.stdin

        def write(frame: bytes) -> None:
            stdin.write(frame)
            stdin.flush()  # so that a small frame is not kept until the next ones come

        frames = FrameQueue(write)
        try:
            try:
                yield frames
                frames.finish()
                encoder.stdin.close()
                is_fed = True
            except BrokenPipeError:
                is_fed = False  # the encoder has ended, and its messages say why
            if encoder.wait() or not is_fed:
                said.seek(0)
                raise failed(said.read().decode(errors="replace"))
        finally:
            encoder.kill()
            encoder.wait()
            frames.abandon()
            with suppress(BrokenPipeError):
                encoder.stdin.close()


def started(options: list[str], said: int, stdout: int) -> "subprocess.Popen[bytes]":
    """Start the encoder, which reads frames from its stdin and writes its messages to the descriptor `said`.

    Raises:
        ResourceError: It cannot be started.
    """
    import imageio_ffmpeg  # only here, so that all that makes no videos works without it

    name = "ffmpeg"
    try:
        name = imageio_ffmpeg.get_ffmpeg_exe()
        # A group of its own spares it the Ctrl-C of a terminal: this process decides what becomes of it.
        return subprocess.Popen(
            [name, "-y", *options], stdin=subprocess.PIPE, stdout=stdout, stderr=said, process_group=0
        )
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the package imageio-ffmpeg holds none"
        raise ResourceError(
            f"the video encoder {name} cannot be started ({reason}); run: "
            f"{install_package('imageio-ffmpeg', '--force-reinstall')}, and unset "
            "IMAGEIO_FFMPEG_EXE if it names another one"
        ) from None


def failure(path: Path, said: str) -> VideoError:
    """The error for an encoder that stopped, with its last messages and the free space on the disk."""
    free = shutil.disk_usage(path.parent).free
    words = " ".join(said.split()[-40:]) or "nothing"
    return VideoError(f"{path}: the video encoder stopped; it said: {words}. {free / 1e6:.1f} MB are free on that disk")
