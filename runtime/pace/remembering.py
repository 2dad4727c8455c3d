"""What a stream remembers: how many latent frames by a cache policy, how many bytes, and the launches that it takes."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from wanforge.configs.causal import CachePolicy, CausalConfig
from wanforge.runtime.measure.cost.launches import BF16, LaunchCost, cdiv, sweep
from wanforge.runtime.pace.workload import ChunkWorkload
from wanforge.runtime.reference.causal.chunks import endless_chunks
from wanforge.runtime.reference.causal.kv_codes import GROUP, KVFormat
from wanforge.runtime.reference.causal.window import Window
from wanforge.runtime.reference.dit import ROPE_PAIRS

CODE = SCALE = 1
"""Bytes of a number in 8 bits, and of the scale of a group of them."""
TIME_SHARE = ROPE_PAIRS[0] / sum(ROPE_PAIRS)
"""The share of a key's channels that its time rotates."""


@dataclass(frozen=True)
class Seen:
    """What there is when a chunk is begun, in latent frames.

    Attributes:
        seen: What the chunk sees of earlier ones.
        held: What is kept, for this chunk or for later ones.
    """

    seen: int
    held: int


def growth(policy: CachePolicy, causal: CausalConfig) -> Iterator[Seen]:
    """What there is when each chunk of a video without end is begun."""
    window = Window(policy)
    for chunk in endless_chunks(causal):
        yield Seen(len(window.frames), len(window.held))
        window.append(chunk)


def at_last(policy: CachePolicy, causal: CausalConfig, chunks: int) -> Seen:
    """What there is when the last chunk of a video is begun."""
    return next(islice(growth(policy, causal), chunks - 1, None))


@dataclass(frozen=True)
class Remembering:
    """How chunks are remembered.

    Attributes:
        form: How keys and values are kept.
    """

    policy: CachePolicy
    form: KVFormat

    def chunk_bytes(self, w: ChunkWorkload) -> int:
        """Bytes of the keys and values of one chunk, as `KVCache.nbytes` counts them."""
        if self.form == "native":
            return 2 * BF16 * w.model.dit.num_layers * w.stream
        keys, values = w.D * cdiv(w.L, GROUP), w.stream // GROUP
        return (keys + values) * (GROUP * CODE + SCALE) * w.model.dit.num_layers

    def scratch_bytes(self, w: ChunkWorkload) -> int:
        """Bytes of what is decoded for one layer."""
        return 0 if self.form == "native" else 2 * BF16 * w.P * w.D

    def once(self, w: ChunkWorkload) -> list[LaunchCost]:
        """What a chunk begins with, in all layers: keys that are kept rotated are moved to the times at which the chunk
        sees them."""
        if self.form != "native" or not self.policy.moves or not w.P:
            return []
        return [sweep("move keys in time", int(w.P * w.D * TIME_SHARE), BF16, BF16)] * w.model.dit.num_layers

    def each_pass(self, w: ChunkWorkload) -> list[LaunchCost]:
        """What each pass takes, in all layers: codes become numbers, and keys are rotated."""
        if self.form == "native" or not w.P:
            return []
        numbers = 2 * w.P * w.D
        decoding = LaunchCost("decode keys, values", {}, numbers + numbers // GROUP, BF16 * numbers)
        return [decoding] * w.model.dit.num_layers

    def afterwards(self, w: ChunkWorkload) -> list[LaunchCost]:
        """What remembering a finished chunk takes, in all layers, besides its pass through the network."""
        layers = w.model.dit.num_layers
        written = self.chunk_bytes(w) // layers
        return [LaunchCost("remember keys, values", {}, 2 * BF16 * w.stream, written)] * layers
