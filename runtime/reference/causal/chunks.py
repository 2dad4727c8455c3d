"""The chunks of a video: how its latent frames are divided, and when later chunks are sampled."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from wanforge.configs.causal import CausalConfig
from wanforge.configs.sampler import SamplerConfig
from wanforge.runtime.reference.steps import Trajectory, trajectory


@dataclass(frozen=True)
class Span:
    """Consecutive latent frames that are made at once.

    Attributes:
        index: Number of the chunk, from 0; an image that begins a video is chunk 0.
        start, stop: Its first latent frame, and the one after its last.
    """

    index: int
    start: int
    stop: int

    @property
    def frames(self) -> range:
        return range(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


def chunks_of(causal: CausalConfig, latent_frames: int) -> list[Span]:
    """Divide a video into chunks.

    Raises:
        ConfigError: The frames after the first chunk cannot be divided into chunks.
    """
    return list(islice(endless_chunks(causal), causal.num_chunks(latent_frames)))


def endless_chunks(causal: CausalConfig) -> Iterator[Span]:
    """The chunks of a video without end."""
    first, rest = causal.first_frames, causal.chunk_frames
    yield Span(0, 0, first)
    for index in count(1):
        yield Span(index, first + (index - 1) * rest, first + index * rest)


def trajectories(causal: CausalConfig, sampler: SamplerConfig) -> Iterator[Trajectory]:
    """The way from noise to latents of each chunk that is made, without end: the first chunk's, then that of all
    others."""
    yield trajectory(sampler)
    later = trajectory(sampler, times=causal.times or None)
    while True:
        yield later
