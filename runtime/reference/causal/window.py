"""What each chunk of a stream sees of the chunks before it, by a cache policy: which frames, and at which times.

Nothing here holds keys or values. Every policy is the same few rules with other numbers (`CachePolicy`).

Source: Causal-rCM, rcm/inference/wan2pt1_t2v_causal_extrapolation_infer.py (docs/sources.md).
"""

from dataclasses import dataclass
from itertools import chain

from wanforge.configs.causal import CachePolicy
from wanforge.runtime.reference.causal.chunks import Span

Block = tuple[int, ...]
"""The numbers of the latent frames of one block, in the order in which they are seen."""


@dataclass(frozen=True)
class View:
    """What a chunk sees.

    Attributes:
        frames: The remembered frames, by their numbers in the video, in the order of the cache.
        times: The temporal index at which each of them is seen.
        own: The temporal indices of the chunk's own frames.
    """

    frames: tuple[int, ...]
    times: tuple[int, ...]
    own: tuple[int, ...]


class Window:
    """The memory of one stream by a policy, as numbers of frames."""

    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.blocks: list[Block] = []
        self.bank: list[Block] = []
        self.phase = 0

    @property
    def frames(self) -> tuple[int, ...]:
        """The frames that the next chunk will see."""
        return tuple(chain.from_iterable(self.blocks))

    @property
    def held(self) -> set[int]:
        """The frames that must be kept, because this chunk or a later one may see them."""
        return {*self.frames, *chain.from_iterable(self.bank)}

    def view(self, chunk: Span, *, cut: bool = False) -> View:
        """What a chunk sees.

        Args:
            cut: Whether a new scene begins with it.
        """
        policy, frames = self.policy, self.frames
        anchor = chunk.start if policy.last_time is None else policy.last_time - len(chunk)
        times = range(anchor - len(frames), anchor) if policy.moves else frames
        own = anchor + policy.cut_shift * cut
        return View(frames, tuple(max(0, time) for time in times), tuple(range(own, own + len(chunk))))

    def append(self, chunk: Span, *, cut: bool = False) -> None:
        """Remember a chunk, and forget what the policy does not keep."""
        policy, newest = self.policy, tuple(chunk.frames)
        if cut and policy.cut_shift:
            self.blocks = [*self.blocks[: policy.sink], newest]
            return
        self.blocks.append(newest)
        if not policy.capacity:
            return
        if policy.has_bank and len(self.blocks) == policy.capacity:
            self.bank = list(self.blocks)
        if len(self.blocks) > policy.capacity:
            self.phase += 1
            self.blocks = self._sink() + self.blocks[-policy.recent :]

    def _sink(self) -> list[Block]:
        """The blocks at the front: the first ones, or those of the bank whose turn it is. A bank of n blocks is gone
        through from the start for n turns, then backwards for as many, frame by frame."""
        if not self.policy.has_bank:
            return self.blocks[: self.policy.sink]
        turn, start = divmod(self.phase, len(self.bank))
        bank = [block[::-1] for block in reversed(self.bank)] if turn % 2 else self.bank
        return (bank[start:] + bank[:start])[: self.policy.sink]
