"""Making a video chunk by chunk: each chunk is sampled from noise, then remembered for the ones after it.

Source: Causal-rCM, rcm/inference/wan2pt1_t2v_causal_infer.py (docs/sources.md).
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from wanforge.configs.causal import CausalConfig
from wanforge.configs.sampler import SamplerConfig
from wanforge.runtime.reference.causal.chunks import Span, trajectories
from wanforge.runtime.reference.causal.network import KeysValues
from wanforge.runtime.reference.causal.noise import ChunkNoise
from wanforge.runtime.reference.causal.window import View
from wanforge.runtime.reference.sampler import renoise
from wanforge.runtime.reference.steps import Trajectory, network_timestep


class ChunkNetwork(Protocol):
    """The denoiser as the rollout drives it."""

    def begin(self, chunk: Span, view: View, past: Iterable[KeysValues]) -> None:
        """Get ready for a chunk: what follows concerns it, until the next one begins.

        Args:
            past: What each layer sees of earlier chunks, as `KVCache.read` yields it.
        """
        ...

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        """The velocity at the chunk's latents, float64 ``[1, C, F, H, W]``, in any float type."""
        ...

    def own(self) -> Sequence[KeysValues]:
        """Each layer's own keys, not rotated, and values, as the last call of `velocity` computed them."""
        ...


class ChunkMemory(Protocol):
    """What a rollout remembers, as `KVCache` defines it."""

    def view(self, chunk: Span, *, cut: bool = False) -> View:
        """What a chunk sees."""
        ...

    def read(self, view: View) -> Iterable[KeysValues]:
        """What each layer sees, keys rotated; nothing if the network has it already."""
        ...

    def append(self, chunk: Span, own: Sequence[KeysValues], *, cut: bool = False) -> None:
        """Remember a chunk."""
        ...


@dataclass(frozen=True)
class Plan:
    """How a video is made.

    Attributes:
        chunks: Its chunks, in order; they may be endless.
        cuts: The numbers of the chunks with which a new scene begins; what is said of a chunk may be added until the
            chunk is asked for.
    """

    causal: CausalConfig
    sampler: SamplerConfig
    chunks: Iterable[Span]
    cuts: Container[int] = frozenset()


class Rollout:
    """One video in the making.

    Args:
        network: The denoiser.
        cache: What is remembered, empty at first.
        noise: The video's noise.
        image: The latents of an image that is its first chunk, ``[1, C, 1, H, W]``.
    """

    def __init__(
        self, plan: Plan, network: ChunkNetwork, cache: ChunkMemory, noise: ChunkNoise, image: Tensor | None = None
    ) -> None:
        self.plan, self.network, self.cache, self.noise, self.image = plan, network, cache, noise, image

    def __iter__(self) -> Iterator[tuple[Span, Tensor]]:
        """Yield each chunk and its clean latents, in float64, as soon as they are there.

        A chunk is remembered when the next one is asked for, so the last one never is, and the first frames do not wait
        for it.
        """
        ways = trajectories(self.plan.causal, self.plan.sampler)
        way, remember = next(ways), None
        for chunk in self.plan.chunks:
            if remember is not None:
                remember()
            if chunk.index == 0 and self.image is not None:
                latents = self.image.double()
                remember = partial(self._prefill, latents, chunk, way)
            else:
                latents = self._sample(chunk, way)
                remember, way = partial(self._remember, latents, chunk), next(ways)
            yield chunk, latents

    def _begin(self, chunk: Span) -> None:
        view = self.cache.view(chunk, cut=chunk.index in self.plan.cuts)
        self.network.begin(chunk, view, self.cache.read(view))

    def _sample(self, chunk: Span, way: Trajectory) -> Tensor:
        self._begin(chunk)
        latents = self.noise.start(chunk).double() * way.start
        for step in way.steps:
            velocity = self.network.velocity(latents, step.timestep)
            latents = renoise(latents, velocity, step, self.noise.fresh(chunk, step.index))
        return latents

    def _remember(self, latents: Tensor, chunk: Span) -> None:
        """Put a chunk into the cache, by the keys and values of its last step or else of its clean latents."""
        if not self._is_noisy(chunk):
            self.network.velocity(latents, 0.0)
        self.cache.append(chunk, self.network.own(), cut=chunk.index in self.plan.cuts)

    def _prefill(self, latents: Tensor, chunk: Span, way: Trajectory) -> None:
        """Put an image into the cache as the first chunk, with noise if later chunks are remembered with noise."""
        time = way.steps[-1].time if self._is_noisy(chunk) else 0.0
        if time:
            latents = (1 - time) * latents + time * self.noise.image().double()
        self._begin(chunk)
        self.network.velocity(latents, network_timestep(time))
        self.cache.append(chunk, self.network.own())

    def _is_noisy(self, chunk: Span) -> bool:
        first = self.plan.causal.noisy_from
        return first is not None and chunk.index >= first
