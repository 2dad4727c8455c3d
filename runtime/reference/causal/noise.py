"""The noise of a video that is made chunk by chunk."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wanforge.runtime.reference.causal.chunks import Span


class ChunkNoise(Protocol):
    """Standard normal float32 tensors for each chunk, ``[1, C, F, H, W]``."""

    def start(self, chunk: Span) -> Tensor:
        """What a chunk begins with."""
        ...

    def fresh(self, chunk: Span, step: int) -> Tensor:
        """What is mixed in after a step, by its number from 0."""
        ...

    def image(self) -> Tensor:
        """What is mixed into the image that begins a video, ``[1, C, 1, H, W]``."""
        ...


@dataclass(frozen=True)
class ClipNoise:
    """The noise of a video of known length, of which each chunk takes its frames.

    Attributes:
        first: For the first frame that is made, and all after it; if an image begins the video, that is frame 1.
        steps: One tensor for each step of the longest trajectory, for all frames. Chunks share them by the number of
            the step.
        picture: For the image that begins a video; any if there is none.
    """

    first: Tensor
    steps: tuple[Tensor, ...]
    picture: Tensor

    def start(self, chunk: Span) -> Tensor:
        missing = self.steps[0].shape[2] - self.first.shape[2]
        return self.first[:, :, chunk.start - missing : chunk.stop - missing]

    def fresh(self, chunk: Span, step: int) -> Tensor:
        return self.steps[step][:, :, chunk.start : chunk.stop]

    def image(self) -> Tensor:
        return self.picture


def draw(shape: tuple[int, ...], steps: int, seed: int, *, has_image: bool) -> ClipNoise:
    """The noise of a video, from a CPU generator in upstream's order.

    Args:
        shape: Of the whole video's latents, ``[1, C, F, H, W]``.
        steps: The number of steps of the longest trajectory.
        has_image: Whether the first frame is an image's.

    Source: Causal-rCM, rcm/inference/wan2pt1_t2v_causal_infer.py (docs/sources.md).
    """
    generator = torch.Generator().manual_seed(seed)
    batch, channels, frames, *area = shape

    def normal(count: int) -> Tensor:
        return torch.randn((batch, channels, count, *area), generator=generator)

    first = normal(frames - has_image)
    return ClipNoise(first, tuple(normal(frames) for _ in range(steps)), normal(1))


@dataclass(frozen=True)
class StreamNoise:
    """The noise of a video whose length nobody knows: each chunk draws its own, from the seed and its number. So a
    video begins in the same way however long it becomes. The numbers are not those of `draw`.

    Attributes:
        shape: Of latents, ``[1, C, F, H, W]``; any number of frames.
    """

    shape: tuple[int, ...]
    seed: int

    def start(self, chunk: Span) -> Tensor:
        return self._drawn(len(chunk), chunk.index, 0)

    def fresh(self, chunk: Span, step: int) -> Tensor:
        return self._drawn(len(chunk), chunk.index, 1 + step)

    def image(self) -> Tensor:
        return self._drawn(1, 0, 0)

    def _drawn(self, frames: int, *place: int) -> Tensor:
        mixed = np.random.SeedSequence((self.seed, *place)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        batch, channels, _, *area = self.shape
        return torch.randn((batch, channels, frames, *area), generator=generator)
