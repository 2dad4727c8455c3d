"""Writing frames as a fragmented mp4, which can be played while it grows."""

import select
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from wanforge.configs.causal import CausalConfig
from wanforge.configs.clip import TEMPORAL_STRIDE, frames_of
from wanforge.runtime.output.video import RATE_FACTOR, FrameSink, VideoError, fed


class ReaderGoneError(Exception):
    """Whoever read a video from a pipe or a socket has gone."""


@contextmanager
def fragments(
    name: str, descriptor: int, size_wh: tuple[int, int], fps: int, causal: CausalConfig
) -> Iterator[FrameSink]:
    """Write frames as H.264 in a fragmented mp4 to a descriptor, whatever it leads to. The head comes first, and each
    frame is a fragment, which is written when the next frame comes or the block ends. A chunk begins with a keyframe.

    If the descriptor takes no more, neither does the encoder, and then the caller waits.

    Args:
        name: What errors call the video.
        size_wh: Width and height in pixels.

    Raises:
        ReaderGoneError: Nobody reads what the descriptor leads to.
        ResourceError: The encoder cannot be started.
        VideoError: The encoder stopped or failed, for example on a full disk.
    """
    first, later = frames_of(causal.first_frames), TEMPORAL_STRIDE * causal.chunk_frames
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size_wh[0]}x{size_wh[1]}", "-r", str(fps), "-i", "-"]
    coded = ["-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", str(RATE_FACTOR), "-tune", "zerolatency"]
    keyframes = ["-g", str(max(first, later)), "-force_key_frames", f"expr:not(mod(n-{first},{later}))"]
    shape = ["-movflags", "frag_every_frame+empty_moov+default_base_moof", "-flush_packets", "1", "-f", "mp4"]
    # Without this, the encoder would first collect frames to find out what they are.
    at_once = ["-probesize", "32", "-analyzeduration", "0"]
    options = [*at_once, *source, *coded, *keyframes, "-v", "error", *shape, "pipe:1"]
    with fed(options, partial(stopped, name, descriptor), descriptor) as frames:
        yield frames.put


def stopped(name: str, descriptor: int, said: str) -> Exception:
    """The error for an encoder that stopped, with its last messages."""
    if is_abandoned(descriptor):
        return ReaderGoneError()
    words = " ".join(said.split()[-40:]) or "nothing"
    return VideoError(f"{name}: the video encoder stopped; it said: {words}. What was written before can be played")


def is_abandoned(descriptor: int) -> bool:
    """Whether a descriptor leads to a pipe or a socket that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are always told
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
