"""How long a video is that is made chunk by chunk, and how long it can be. Nothing here imports PyTorch."""

import math

from wanforge.configs.causal import CachePolicy, CausalConfig
from wanforge.configs.clip import MAX_POSITIONS, TEMPORAL_STRIDE, frames_of
from wanforge.errors import RequestError


def frames_of_chunks(causal: CausalConfig, num_chunks: int) -> int:
    """The latent frames of the first chunks of a video."""
    return causal.first_frames + (num_chunks - 1) * causal.chunk_frames if num_chunks else 0


def chunks_of_seconds(causal: CausalConfig, seconds: float, fps: int) -> int:
    """The number of chunks that hold some seconds of video."""
    latent_frames = 1 + -(-max(0, math.ceil(seconds * fps) - 1) // TEMPORAL_STRIDE)
    return 1 + max(0, -(-(latent_frames - causal.first_frames) // causal.chunk_frames))


def check_length(chosen: CachePolicy, causal: CausalConfig, fps: int, num_chunks: int | None) -> None:
    """Refuse a length for which a model has no temporal positions, or which no memory would hold.

    Args:
        num_chunks: None for a video without end.

    Raises:
        RequestError: The model cannot make a video of this length with this cache policy.
    """
    if num_chunks is not None and num_chunks < 1:
        raise RequestError(f"{num_chunks} chunks are no video; ask for 1 or more")
    if num_chunks is None and not chosen.capacity:
        raise RequestError("a cache that forgets nothing has no room for a video without end; ask for some chunks")
    most = 1 + (MAX_POSITIONS - causal.first_frames) // causal.chunk_frames
    if chosen.last_time is None and (num_chunks is None or num_chunks > most):
        frames = frames_of(frames_of_chunks(causal, most))
        raise RequestError(
            f"with this cache policy, time goes on with the video, and the model knows {MAX_POSITIONS:,} latent "
            f"frames: at most {most:,} chunks, which are {frames:,} frames or {frames / fps:.0f} s; found "
            f"{'no end' if num_chunks is None else f'{num_chunks:,} chunks'}. Ask for fewer, or use infinity_rope, "
            "which has no end"
        )
