"""What a stream remembers: how many latent frames by a cache policy, how many bytes, and the launches that it takes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from math import prod
from typing import NamedTuple, cast

import torch

from wanforge.configs.causal import CachePolicy, CausalConfig
from wanforge.configs.model import HEAD_DIM
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.causal.slots import KVSlots, bytes_beside
from wanforge.runtime.measure.cost.eager import Operations
from wanforge.runtime.measure.cost.launches import BF16, LaunchCost, cdiv
from wanforge.runtime.pace.workload import ChunkWorkload
from wanforge.runtime.reference.causal.chunks import endless_chunks
from wanforge.runtime.reference.causal.kv_codes import GROUP, KVFormat
from wanforge.runtime.reference.causal.network import KeysValues
from wanforge.runtime.reference.causal.window import Window


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

    def least_bytes(self, w: ChunkWorkload, held: int) -> int:
        """Bytes of the keys and values of some latent frames, each kept once, as `KVCache.nbytes` counts them."""
        if self.form == "native":
            return 2 * BF16 * w.model.dit.num_layers * w.stream * held // w.frames
        keys, values = w.D * cdiv(w.L, GROUP), w.stream // GROUP
        return (keys + values) * (GROUP + 1) * w.model.dit.num_layers * held // w.frames

    def beside_bytes(self, w: ChunkWorkload) -> int:
        """Bytes of what is kept beside the keys and values that attention reads, which are never codes."""
        return bytes_beside(self.policy, self.form, w.model.dit, w.L, BF16)

    def launches(self, w: ChunkWorkload) -> "Keeping":
        """What it takes to remember chunks, in all layers, besides their passes through the network."""
        return recorded(self, Frames(w.frames, w.past, w.shape.grid[1:], w.D, w.model.dit.num_layers))


class Frames(NamedTuple):
    """What of a chunk decides what keeping it takes.

    Attributes:
        own, past: Its latent frames, and those that it sees.
        grid: Rows and columns of a frame's tokens.
        dim: The model's width.
        layers: Its layers.
    """

    own: int
    past: int
    grid: tuple[int, int]
    dim: int
    layers: int

    def keys_values(self, frames: int) -> KeysValues:
        """Keys and values of one layer of some latent frames, on the device of this context."""
        shape = (1, frames * prod(self.grid), self.dim // HEAD_DIM, HEAD_DIM)
        return KeysValues(*(torch.empty(shape, dtype=torch.bfloat16) for _ in range(2)))


class Keeping(NamedTuple):
    """The launches that keep keys and values.

    Attributes:
        begin: With which chunks begin: what they see is put where attention reads it.
        end: With which chunks end: what they leave is kept.
        chunks: How many chunks these are of.
    """

    begin: list[LaunchCost]
    end: list[LaunchCost]
    chunks: int


FAR = 2
"""A chunk is far into a video after this many times as many chunks as are remembered."""


@lru_cache(maxsize=256)
def recorded(remembering: Remembering, of: Frames) -> Keeping:
    """What `KVSlots` computes, one operation of PyTorch at a time. Where chunks differ, because a bank is gone through
    there and back again, it is that of all of them."""
    policy, causal = remembering.policy, CausalConfig(first_frames=of.own, chunk_frames=of.own)
    is_full = policy.capacity and of.past >= policy.capacity * of.own
    before = FAR * policy.capacity if is_full else of.past // of.own
    counted = 2 * policy.capacity if is_full and policy.has_bank else 1
    begin, end = Operations(), Operations()
    with torch.device("meta"), torch.inference_mode():
        past, own = of.keys_values(of.past + of.own), of.keys_values(of.own)
        slots = KVSlots(policy, of.grid, [past] * of.layers, cast("Backend", Undisturbed()), remembering.form)
        for chunk in islice(endless_chunks(causal), before + counted):
            is_counted = chunk.index >= before
            with begin if is_counted else nullcontext():
                slots.read(slots.view(chunk))
            with end if is_counted else nullcontext():
                slots.append(chunk, [own] * of.layers)
    return Keeping(begin.found, end.found, counted)


class Undisturbed:
    """What `KVSlots` needs of a backend: nobody else uses its memory."""

    def lease(self) -> Callable[[], None]:
        return lambda: None

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()
