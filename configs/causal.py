"""Models that make a video chunk by chunk: how long the chunks are, how each is sampled, and what is remembered.

Source: Causal-rCM (arXiv:2606.25473), rcm/inference/wan2pt1_t2v_causal_infer.py and
wan2pt1_t2v_causal_extrapolation_infer.py (docs/sources.md).
"""

from typing import Annotated, Literal

from msgspec import Meta
from msgspec.structs import replace

from wanforge.configs.clip import frames_of
from wanforge.configs.loading import Count, Fraction, Record
from wanforge.configs.sampler import check_times
from wanforge.errors import ConfigError

Blocks = Annotated[int, Meta(ge=0, le=1 << 20)]

BLOCKS = 6
"""How many chunks upstream's policies remember, except for the one that forgets nothing."""

PolicyName = Literal["none", "sliding_window", "rolling_sink", "infinity_rope"]
"""Upstream's names for cache policies."""


class CachePolicy(Record, frozen=True):
    """Which chunks a stream remembers, and at which times its network sees them.

    A chunk is a block of the cache. When there are more than `capacity`, the first `sink` blocks stay, and the `recent`
    newest. The defaults forget nothing.
    """

    capacity: Blocks = 0
    """The most blocks that are remembered; 0 for all."""
    sink: Blocks = 0
    """How many blocks from the beginning stay."""
    recent: Blocks = 0
    """How many of the newest blocks stay."""
    has_bank: bool = False
    """Whether the blocks at the front are taken in turn from a copy of the cache as it was when it was first full,
    there and back again, instead of being the first ones."""
    times: Literal["absolute", "contiguous"] = "absolute"
    """At which times frames are seen: at their own, or one directly after the other up to the chunk that is made."""
    last_time: Count | None = None
    """The time that follows that of the newest frame, whatever the length of the video. By default, each chunk is at
    its own time."""
    cut_shift: Blocks = 0
    """By how many frames the chunk at a scene cut is moved in time, after which only it and the sink are remembered. 0
    if scene cuts change nothing."""

    def __post_init__(self) -> None:
        if self.capacity and not (self.recent and self.sink + self.recent <= self.capacity):
            raise ValueError(
                f"sink is {self.sink} and recent {self.recent}; recent must be at least 1, and both together at most "
                f"capacity, which is {self.capacity}"
            )

    @property
    def moves(self) -> bool:
        """Whether a frame is seen at other times by later chunks."""
        return self.times == "contiguous"


def policy(name: PolicyName, blocks: int = BLOCKS, sink: int | None = None) -> CachePolicy:
    """A policy by upstream's name for it, with upstream's defaults.

    Args:
        name: ``none`` remembers everything; ``sliding_window`` the newest chunks; ``rolling_sink``
            the newest chunk, and by turns those of the beginning; ``infinity_rope`` the newest chunks at times that do
            not grow with the video.
        blocks: How many chunks are remembered.
        sink: How many of them are from the beginning.

    Raises:
        ValueError: The sink leaves no room for the newest chunk.
    """
    match name:
        case "none":
            return CachePolicy()
        case "sliding_window":
            first = sink or 0
            return CachePolicy(blocks, first, blocks - first)
        case "rolling_sink":
            first = blocks - 1 if sink is None else sink
            return CachePolicy(blocks, first, blocks - first, has_bank=True, times="contiguous")
        case "infinity_rope":
            first = 1 if sink is None else sink
            return CachePolicy(blocks, first, blocks - first, times="contiguous", last_time=21, cut_shift=21)


class CausalConfig(Record, frozen=True):
    """How a causal model is run. Its sampler holds the times of the first chunk."""

    first_frames: Count = 1
    """Latent frames of the first chunk."""
    chunk_frames: Count = 1
    """Latent frames of every later chunk."""
    times: tuple[Fraction, ...] = ()
    """Rectified-flow times of every later chunk; by default those of the first."""
    noisy_from: int | None = None
    """The first chunk of which later ones see keys and values as the last step of sampling computed them. Of those
    before it, and by default of all, they are computed from the finished latents."""
    cache: CachePolicy = CachePolicy()

    def __post_init__(self) -> None:
        check_times(self.times)
        if self.noisy_from is not None and self.noisy_from < 0:
            raise ValueError(f"noisy_from is {self.noisy_from}; chunks are counted from 0")

    @property
    def longest(self) -> int:
        """The latent frames of the longest chunk."""
        return max(self.first_frames, self.chunk_frames)

    def beginning(self, *, with_image: bool) -> "CausalConfig":
        """How a video is made that begins with an image, which is the first chunk, or with none."""
        return replace(self, first_frames=1) if with_image else self

    def past_frames(self, latent_frames: int) -> int:
        """The latent frames that the last chunk of a video sees of earlier ones if nothing is forgotten."""
        return latent_frames - self.chunk_frames

    def most_past_frames(self, latent_frames: int) -> int:
        """The most latent frames that a chunk sees of earlier ones: in a video of this length if nothing is forgotten,
        or in one without end under the policies that forget, whichever is more."""
        blocks = max(BLOCKS, self.cache.capacity)
        return max(self.past_frames(latent_frames), blocks * self.longest)

    def num_chunks(self, latent_frames: int) -> int:
        """The number of chunks of a video.

        Raises:
            ConfigError: The frames after the first chunk cannot be divided into chunks.
        """
        later, left = divmod(latent_frames - self.first_frames, self.chunk_frames)
        if later < 0 or left:
            fitting = [self.first_frames + self.chunk_frames * max(0, count) for count in (later, later + 1)]
            advice = " or ".join(str(frames_of(each)) for each in dict.fromkeys(fitting))
            raise ConfigError(
                f"{frames_of(latent_frames)} frames are {latent_frames} latent frames, which are not one chunk of "
                f"{self.first_frames} and others of {self.chunk_frames}; make it {advice} frames"
            )
        return 1 + later
