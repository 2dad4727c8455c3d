"""The clip of a job that is watched while it is made."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from wanforge.runtime.output.video import VideoError
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request
from wanforge.runtime.service.catalogue import Asked
from wanforge.runtime.service.child.extending import continuing
from wanforge.runtime.service.child.live.show import Show
from wanforge.runtime.service.child.messages import ClipMade, MakeClip
from wanforge.runtime.service.live.terms import LiveTerms
from wanforge.runtime.service.live.wire import Link, NobodyWatchesError
from wanforge.runtime.streaming.live import live_from


def streamed(
    pipeline: Pipeline, request: Request, asked: Asked, order: MakeClip, report: Callable[[str, int], object]
) -> ClipMade:
    """Show a stream for as long as it is watched, and make a clip of what there is of it in the end.

    Raises:
        NobodyWatchesError: Nobody watches it, and nothing of it is there.
        Exception: It cannot be made; see `failures.failure_of`.
    """
    terms, folder = asked.live, Path(order.folder)
    assert terms is not None
    if order.before is not None:
        request, _ = continuing(pipeline, request, Path(order.before))
    made = live_from(pipeline, request, terms.chunks, {"cache": terms.cache, "kv": terms.kv})
    show = Show(made, terms, linked(Path(order.service), terms), folder / "live.mp4")
    show.run(report)
    seekable(show.file, folder / "video.mp4")
    pictures, sheet = show.samples.draw(folder)
    details = {
        "timings": made.timings.stages,
        "total_seconds": made.timings.total,
        "seed": asked.seed,
        "recipe": asked.recipe,
        "spritesheet": sheet,
        "frames": show.samples.count,
        "chunks": show.chunks,
        "ended": show.reason,
    }
    files = {"video": "video.mp4", **pictures}
    return ClipMade(order.ticket, files, pipeline.backend.name, made.timings.stages, details)


def linked(folder: Path, terms: LiveTerms) -> Link:
    """The connection to the server that expects a stream.

    Raises:
        NobodyWatchesError: The server has ended.
    """
    try:
        return Link(folder, terms.screen)
    except OSError as error:
        raise NobodyWatchesError(f"the server that wanted to show this stream has ended ({error.strerror})") from None


def seekable(live: Path, video: Path) -> None:
    """Write a fragmented mp4 anew as one that says how long it is and where its frames are, without encoding it again.

    Raises:
        VideoError: It cannot be written.
    """
    import imageio_ffmpeg

    source, target = ["-i", f"file:{live}"], ["-c", "copy", "-movflags", "+faststart", f"file:{video}"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *source, *target]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VideoError(f"the stream cannot be kept as a video: {' '.join(done.stderr.split()[-40:])}")
