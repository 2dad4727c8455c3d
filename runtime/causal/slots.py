"""What a stream remembers, where attention reads it: a slot of memory for each frame."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanforge.configs.causal import CachePolicy
from wanforge.configs.model import DiTConfig
from wanforge.plugins.rms_norm_rope.reference import rotate
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.reference.causal.chunks import Span
from wanforge.runtime.reference.causal.kv_codes import GROUP, Along, Codes, KVFormat, decode, encode
from wanforge.runtime.reference.causal.network import KeysValues
from wanforge.runtime.reference.causal.window import View, Window
from wanforge.runtime.reference.dit import rope_tables

Held = Tensor | Codes

AT_ONCE = 6
"""The most frames whose keys are moved at once: more would save few launches, and take more memory meanwhile."""


@dataclass(frozen=True)
class Beside:
    """What is kept of a chunk beside the slots, for each layer.

    Attributes:
        keys: As they leave their norm, because later chunks see them at other times.
        values: Empty where the slots hold all of them.
    """

    chunk: Span
    keys: Sequence[Held]
    values: Sequence[Held]


class KVSlots:
    """The keys and values of a stream in buffers at fixed addresses; what chunks see is what `KVCache` has them see.

    The order of keys means nothing to attention, so a frame stays in its slot for as long as it is seen, and its slot
    goes to another frame after that. What is not seen is masked by the caller. Keys are rotated once, when the chunk
    is remembered, if frames keep their times. Otherwise they are also kept as they are before that, and the keys of
    each frame that is seen at another time than before are rotated anew: moving rotated keys would round them again
    and again. Numbers in 8 bits are decoded when they are put into a slot, and stay there as they are then.

    Args:
        grid: Rows and columns of a frame's tokens.
        past: Each layer's keys and values, ``[1, slots * rows * columns, H, K]``, zeros at first.
        backend: Whose memory that is.
    """

    def __init__(
        self,
        policy: CachePolicy,
        grid: tuple[int, int],
        past: Sequence[KeysValues],
        backend: Backend,
        form: KVFormat = "native",
    ) -> None:
        self.window, self.grid, self.past, self.backend, self.form = Window(policy), grid, past, backend, form
        self._check = backend.lease()
        self.area = grid[0] * grid[1]
        self.count = past[0].keys.shape[1] // self.area
        self.beside: list[Beside] = []
        self.slots: dict[int, int] = {}
        self.times: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of what is kept beside the slots."""
        return sum(held.nbytes for each in self.beside for held in (*each.keys, *each.values))

    def view(self, chunk: Span, *, cut: bool = False) -> View:
        """What a chunk sees; see `Window.view`."""
        return self.window.view(chunk, cut=cut)

    def seen(self, view: View) -> list[int]:
        """The slots of what a chunk sees."""
        return sorted(self.slots[frame] for frame in view.frames)

    def read(self, view: View) -> Iterable[KeysValues]:
        """Put what a chunk sees into its slots. Nothing is yielded, because that is where the network reads it.

        Raises:
            ResourceError: Another request has taken the memory.
        """
        with self.backend.turn():
            self._check()
            self._release(view.frames)
            if self.beside:
                self._place(dict(zip(view.frames, view.times, strict=True)))
        return ()

    def append(self, chunk: Span, own: Sequence[KeysValues], *, cut: bool = False) -> None:
        """Remember a chunk by its own keys, not rotated, and values, and forget what the policy does not keep.

        Raises:
            ResourceError: Another request has taken the memory.
        """
        times = self.view(chunk, cut=cut).own
        with self.backend.turn():
            self._check()
            self.window.append(chunk, cut=cut)
            held, moves = self.window.held, self.window.policy.moves
            self.beside = [each for each in self.beside if not held.isdisjoint(each.chunk.frames)]
            self._release(self.window.frames)
            self._take(chunk.frames)
            if moves:
                self.beside.append(self._kept(chunk, own))
            tables = () if moves else self._tables(times)
            for past, each in zip(self.past, own, strict=True):
                self._write(past.values, chunk.frames, self._rounded(each.values, "channels"))
                if tables:
                    self._write(past.keys, chunk.frames, rotate(self._rounded(each.keys, "tokens"), *tables))

    def _place(self, times: dict[int, int]) -> None:
        """Put the keys of frames at these times, and frames that have had no slot into one."""
        moved = [frame for frame, time in times.items() if self.times.get(frame) != time]
        new = [frame for frame in times if frame not in self.slots]
        self._take(new)
        self.times |= times
        groups = [moved[start : start + AT_ONCE] for start in range(0, len(moved), AT_ONCE)]
        tables = [self._tables([times[frame] for frame in group]) for group in groups]
        for layer, past in enumerate(self.past):
            keys = self._by_frame(moved, [(each.chunk, each.keys[layer]) for each in self.beside])
            for group, table in zip(groups, tables, strict=True):
                self._write(past.keys, group, rotate(torch.cat([keys[frame] for frame in group], 1), *table))
            if new:
                values = self._by_frame(new, [(each.chunk, each.values[layer]) for each in self.beside])
                self._write(past.values, new, torch.cat([values[frame] for frame in new], 1))

    def _release(self, frames: Iterable[int]) -> None:
        """Give up the slots of all other frames."""
        kept = set(frames)
        self.slots = {frame: slot for frame, slot in self.slots.items() if frame in kept}
        self.times = {frame: time for frame, time in self.times.items() if frame in kept}

    def _take(self, frames: Iterable[int]) -> None:
        """Give each frame the first slot that is free, so that the last slots stay empty for as long as they can."""
        free = iter(sorted(set(range(self.count)) - set(self.slots.values())))
        self.slots |= {frame: next(free) for frame in frames}

    def _kept(self, chunk: Span, own: Sequence[KeysValues]) -> Beside:
        values = own if self.window.policy.has_bank else []
        keys = [self._encoded(each.keys, "tokens") for each in own]
        return Beside(chunk, keys, [self._encoded(each.values, "channels") for each in values])

    def _encoded(self, x_BLHK: Tensor, along: Along) -> Held:
        return x_BLHK.clone() if self.form == "native" else encode(x_BLHK, self.form, along)

    def _rounded(self, x_BLHK: Tensor, along: Along) -> Tensor:
        return x_BLHK if self.form == "native" else decode(encode(x_BLHK, self.form, along))

    def _by_frame(self, frames: Collection[int], kept: Iterable[tuple[Span, Held]]) -> dict[int, Tensor]:
        """What is kept of the frames of the chunks in which these frames are."""
        found: dict[int, Tensor] = {}
        for chunk, held in kept:
            if not set(frames).isdisjoint(chunk.frames):
                whole = decode(held) if isinstance(held, Codes) else held
                found |= zip(chunk.frames, whole.split(self.area, 1), strict=True)
        return found

    def _tables(self, times: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The cosines and sines of frames at these times, which are the same in all layers."""
        return rope_tables((len(times), *self.grid), self.past[0].keys.device, times)

    def _write(self, slots_BPHK: Tensor, frames: Iterable[int], x_BLHK: Tensor) -> None:
        """Put frames into their slots."""
        for frame, of_frame in zip(frames, x_BLHK.split(self.area, 1), strict=True):
            start = self.slots[frame] * self.area
            slots_BPHK[:, start : start + self.area].copy_(of_frame)


def bytes_beside(policy: CachePolicy, form: KVFormat, dit: DiTConfig, tokens: int, itemsize: int) -> int:
    """The most bytes that `KVSlots` keeps beside its slots.

    Args:
        tokens: Of the longest chunk.
        itemsize: Bytes of one element of the compute type.
    """
    if not policy.moves:
        return 0
    # A chunk that comes is there before the oldest one goes, and a bank outlives the window.
    chunks = policy.capacity + 1 + policy.recent * policy.has_bank
    rows = tokens if form == "native" else -(-tokens // GROUP) * GROUP
    of_number = itemsize if form == "native" else 1 + 1 / GROUP
    return int(chunks * dit.num_layers * (1 + policy.has_bank) * rows * dit.dim * of_number)
