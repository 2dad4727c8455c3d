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
from wanforge.engines.bundle.shapes import concrete
from wanforge.plugins.recall import GROUP
from wanforge.plugins.recall.reference import KeptRows
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.causal.kept import KeptApart, kept_apart, recall_of
from wanforge.runtime.causal.kept_chunks import KeptChunks, Shelf
from wanforge.runtime.causal.slots import KVSlots
from wanforge.runtime.dtypes import element_type
from wanforge.runtime.measure.cost.eager import Operations
from wanforge.runtime.measure.cost.launches import BF16, LaunchCost, cdiv
from wanforge.runtime.pace.workload import ChunkWorkload
from wanforge.runtime.reference.causal.chunks import endless_chunks
from wanforge.runtime.reference.causal.kv_codes import KVFormat
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

    def kept(self, w: ChunkWorkload) -> KeptApart | None:
        """How keys and values are kept apart from where attention reads them, while such a chunk is made."""
        return kept_apart(self.policy, self.form, None if self.policy.capacity else 1 + w.past // w.frames)

    def launches(self, w: ChunkWorkload) -> "Keeping":
        """What it takes to remember chunks, in all layers, besides their passes through the network."""
        of = Frames(w.frames, w.past, w.shape.grid[1:], w.D, w.model.dit.num_layers)
        return recorded(self.policy, self.kept(w), of)


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

    @property
    def area(self) -> int:
        """The tokens of a frame."""
        return prod(self.grid)

    def keys_values(self, frames: int) -> KeysValues:
        """Keys and values of one layer of some latent frames, on the device of this context."""
        shape = (1, frames * self.area, self.dim // HEAD_DIM, HEAD_DIM)
        return KeysValues(*(torch.empty(shape, dtype=torch.bfloat16) for _ in range(2)))

    def memory(self, policy: CachePolicy, kept: KeptApart | None) -> KVSlots | KeptChunks:
        """What such chunks are remembered in, on the device of this context."""
        backend, seen = cast("Backend", Undisturbed()), self.past + self.own
        if kept is None:
            return KVSlots(policy, self.grid, [self.keys_values(seen)] * self.layers, backend)
        sizes = {"past_tokens": seen * self.area, "kept_groups": kept.groups(self.own * self.area)}
        read = recall_of(kept, self.dim)
        tensors = {
            port.name: torch.empty(concrete(port.shape, sizes), dtype=element_type(port.dtype, torch.bfloat16))
            for port in read.inputs
        }
        rows = KeptRows(*(tensors[name] for name in read.kept))
        shelf = Shelf([rows] * self.layers, tensors["places"], (tensors["past_cos"], tensors["past_sin"]))
        return KeptChunks(policy, self.grid, kept, shelf, backend)


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
def recorded(policy: CachePolicy, kept: KeptApart | None, of: Frames) -> Keeping:
    """What `KVSlots` or `KeptChunks` computes, one operation of PyTorch at a time. Where chunks differ, because a bank
    is gone through there and back again, it is that of all of them."""
    causal = CausalConfig(first_frames=of.own, chunk_frames=of.own)
    is_full = policy.capacity and of.past >= policy.capacity * of.own
    before = FAR * policy.capacity if is_full else of.past // of.own
    counted = 2 * policy.capacity if is_full and policy.has_bank else 1
    begin, end = Operations(), Operations()
    with torch.device("meta"), torch.inference_mode():
        memory, own = of.memory(policy, kept), of.keys_values(of.own)
        for chunk in islice(endless_chunks(causal), before + counted):
            is_counted = chunk.index >= before
            with begin if is_counted else nullcontext():
                memory.read(memory.view(chunk))
            with end if is_counted else nullcontext():
                memory.append(chunk, [own] * of.layers)
    return Keeping(begin.found, end.found, counted)


class Undisturbed:
    """What a memory needs of a backend: nobody else uses it."""

    def lease(self) -> Callable[[], None]:
        return lambda: None

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()
