"""The clip of a job that is watched while it is made."""

import subprocess
from pathlib import Path
from tempfile import TemporaryFile

from wanforge.runtime.output.video import VideoError
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request
from wanforge.runtime.service.catalogue import Asked
from wanforge.runtime.service.child.extending import continuing
from wanforge.runtime.service.child.live.show import LOOK_SECONDS, Show
from wanforge.runtime.service.child.loras import told_loras
from wanforge.runtime.service.child.maker import Report
from wanforge.runtime.service.child.messages import ClipMade, MakeClip
from wanforge.runtime.service.live.terms import LiveTerms
from wanforge.runtime.service.live.wire import Link, NobodyWatchesError
from wanforge.runtime.streaming.live import live_from

WRITE = "write"
"""The stage in which what was watched becomes a clip."""


def streamed(pipeline: Pipeline, request: Request, asked: Asked, order: MakeClip, report: Report) -> ClipMade:
    """Show a stream for as long as it is watched, and make a clip of what there is of it in the end.

    Raises:
        NobodyWatchesError: Nobody watches it, and nothing of it is there.
        Exception: It cannot be made; see `failures.failure_of`.
    """
    terms, folder = asked.live, Path(order.folder)
    assert terms is not None
    if order.before is not None:
        request, _ = continuing(pipeline, request, Path(order.before), report)
    made = live_from(pipeline, request, terms.chunks, {"cache": terms.cache, "kv": terms.kv})
    show = Show(made, terms, linked(Path(order.service), terms), folder / "live.mp4")
    show.run(report)
    seekable(show.file, folder / "video.mp4", report)
    report(WRITE, 0)
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
        "loras": told_loras(pipeline, request.loras),
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


def seekable(live: Path, video: Path, report: Report) -> None:
    """Write a fragmented mp4 anew as one that says how long it is and where its frames are, without encoding it again.

    Args:
        report: Called again and again for as long as the file changes.

    Raises:
        VideoError: It cannot be written.
    """
    import imageio_ffmpeg

    source, target = ["-i", f"file:{live}"], ["-c", "copy", "-movflags", "+faststart", f"file:{video}"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *source, *target]
    with TemporaryFile() as said, subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=said) as writing:
        try:
            changed_at = None
            while not has_ended(writing):
                before, changed_at = changed_at, video.stat().st_mtime_ns if video.exists() else None
                if changed_at != before:
                    report(WRITE, 0)
        except BaseException:
            writing.kill()
            raise
        said.seek(0)
        words = said.read().decode(errors="replace").split()
    if writing.returncode:
        raise VideoError(f"the stream cannot be kept as a video: {' '.join(words[-40:])}")


def has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Wait a little for the end of a process, and say whether it has come."""
    try:
        process.wait(LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True
