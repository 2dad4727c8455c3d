"""What a continuation begins with: the frames of a video, or a picture."""

from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from wanforge.errors import RequestError
from wanforge.regular_file import check_regular
from wanforge.runtime.continuation.chain import Frame
from wanforge.runtime.inputs.image import open_image

VIDEOS = (".mp4", ".mov", ".mkv", ".webm")


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its name."""
    return path.suffix.lower() in VIDEOS


def beginning(path: Path, size_wh: tuple[int, int], fps: int) -> Iterator[Frame]:
    """Yield the frames of a video, or a picture stretched to this size.

    Raises:
        RequestError: The file is missing or cannot be read, or the video has another size.
    """
    if not is_video(path):
        yield np.asarray(open_image(path).resize(size_wh, Image.Resampling.BILINEAR))
        return
    check_regular(path, RequestError)
    has_frames = False
    for frame in frames_of_video(path, size_wh, fps):
        yield frame
        has_frames = True
    if not has_frames:
        raise RequestError(f"{path}: has no frames; give a video, or a picture")


def frames_of_video(path: Path, size_wh: tuple[int, int], fps: int) -> Generator[Frame]:
    """The frames of a video, decoded by ffmpeg.

    Raises:
        RequestError: It cannot be decoded, or it has another size.
    """
    import imageio_ffmpeg  # only here, so that all that reads no videos works without it

    # Without ``file:``, ffmpeg would take what precedes a colon for a protocol.
    reader = imageio_ffmpeg.read_frames(f"file:{path.resolve()}", output_params=["-r", str(fps)])
    count, expected = 0, 0.0
    try:
        told = next(reader)
        (width, height), expected = told["size"], told["duration"] * fps
        if (width, height) != size_wh:
            raise RequestError(
                f"{path}: is {width}x{height}, but its continuation would be {size_wh[0]}x{size_wh[1]}; ask for "
                f"{width}x{height}, too, or give the last frame as a picture"
            )
        for raw in reader:
            count += 1
            yield np.frombuffer(raw, np.uint8).reshape(height, width, 3)
        if count < 0.9 * expected - 1:
            raise RequestError(
                f"{path}: holds {count} of about {expected:.0f} frames, so it is damaged or cut short; fetch it again, "
                "or give the last frame as a picture"
            )
    except (OSError, RuntimeError, StopIteration) as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise RequestError(
            f"{path}: ffmpeg cannot read it as a video ({reason}); give another file, or the last frame as a picture"
        ) from None
    finally:
        reader.close()
