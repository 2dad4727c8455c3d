"""What a stream remembers, each key and value once, apart from where attention reads them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wanforge.configs.causal import CachePolicy
from wanforge.plugins.recall import GROUP
from wanforge.plugins.recall.reference import KeptRows
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.causal.kept import KeptApart
from wanforge.runtime.reference.causal.chunks import Span
from wanforge.runtime.reference.causal.kv_codes import KVFormat, encode
from wanforge.runtime.reference.causal.network import KeysValues
from wanforge.runtime.reference.causal.window import View, Window
from wanforge.runtime.reference.dit import rope_tables

NOWHERE = -1
"""The place of what is not seen."""


class Shelf(NamedTuple):
    """The buffers of a stream that keeps keys and values apart from where attention reads them.

    Attributes:
        layers: What is kept of each layer: places for chunks of equally many rows, a multiple of 64.
        places: Int32 ``[P]``, the rows of what the present chunk sees.
        angles: Cosines and sines by which that is rotated, float32 ``[P, 64]``.
    """

    layers: Sequence[KeptRows]
    places: Tensor
    angles: tuple[Tensor, Tensor]


class KeptChunks:
    """The keys and values of a stream in buffers at fixed addresses; what chunks see is what `KVCache` has them see.

    A chunk is kept as one piece, its keys as they leave their norm, or as codes of 8 bits of them. Before a layer
    attends, what it sees is read from there, frame after frame in the order of the view, and keys are rotated on the
    way. So a frame may be seen at another time by every chunk. This class says what is read (`Shelf.places`), and the
    network reads it.

    Attributes:
        count: The frames that can be seen.
        area: The tokens of a frame.

    Args:
        grid: Rows and columns of a frame's tokens.
        shelf: The buffers, whose rows and angles are zeros at first.
        backend: Whose memory that is.
    """

    def __init__(
        self, policy: CachePolicy, grid: tuple[int, int], kept: KeptApart, shelf: Shelf, backend: Backend
    ) -> None:
        self.window, self.grid, self.kept, self.shelf, self.backend = Window(policy), grid, kept, shelf, backend
        self._check = backend.lease()
        self.area = grid[0] * grid[1]
        self.count = len(shelf.places) // self.area
        self.rows = len(shelf.layers[0].keys) // kept.chunks
        self.chunks: dict[int, Span] = {}

    def view(self, chunk: Span, *, cut: bool = False) -> View:
        """What a chunk sees; see `Window.view`."""
        return self.window.view(chunk, cut=cut)

    def seen(self, view: View) -> list[int]:
        """Where among the frames that can be seen those are which a chunk sees."""
        return list(range(len(view.frames)))

    def read(self, view: View) -> Iterable[KeysValues]:
        """Say what the network reads of each layer for a chunk. Nothing is yielded.

        Raises:
            ResourceError: Another request has taken the memory.
        """
        starts, shelf = self._starts(), self.shelf
        firsts = torch.tensor([starts[frame] for frame in view.frames], dtype=torch.int32)
        rows = (firsts[:, None] + torch.arange(self.area, dtype=torch.int32)).flatten()
        with self.backend.turn():
            self._check()
            shelf.places.copy_(F.pad(rows, (0, len(shelf.places) - len(rows)), value=NOWHERE))
            if view.frames:
                tables = rope_tables((len(view.frames), *self.grid), shelf.places.device, view.times)
                for angles, table in zip(shelf.angles, tables, strict=True):
                    angles[: len(table)].copy_(table)
        return ()

    def append(self, chunk: Span, own: Sequence[KeysValues], *, cut: bool = False) -> None:
        """Remember a chunk by its own keys, not rotated, and values, and forget what the policy does not keep.

        Raises:
            ResourceError: Another request has taken the memory.
        """
        with self.backend.turn():
            self._check()
            self.window.append(chunk, cut=cut)
            held = self.window.held
            self.chunks = {place: each for place, each in self.chunks.items() if not held.isdisjoint(each.frames)}
            place = min(set(range(self.kept.chunks)) - self.chunks.keys())
            self.chunks[place] = chunk
            for layer, each in zip(self.shelf.layers, own, strict=True):
                keep(rows_from(layer, place * self.rows), each, self.kept.form)

    def _starts(self) -> dict[int, int]:
        """The row at which each frame begins."""
        return {
            frame: place * self.rows + number * self.area
            for place, chunk in self.chunks.items()
            for number, frame in enumerate(chunk.frames)
        }


def keep(rows: KeptRows, own: KeysValues, form: KVFormat) -> None:
    """Write a chunk's keys, not rotated, and values of one layer and one sample to the first rows of some."""
    tokens, width = own.keys.shape[1], rows.keys.shape[1]
    if form == "native":
        rows.keys[:tokens].copy_(own.keys[0].flatten(1))
        rows.values[:tokens].copy_(own.values[0].flatten(1))
        return
    assert rows.key_scale is not None
    assert rows.value_scale is not None
    keys, values = encode(own.keys, form, "tokens"), encode(own.values, form, "channels")
    groups = keys.codes.shape[1]
    rows.keys[: groups * GROUP].unflatten(0, (groups, GROUP)).copy_(keys.codes.permute(1, 2, 0))
    rows.key_scale[:groups].copy_(keys.scale[..., 0].T)
    rows.values[:tokens].copy_(values.codes.view(tokens, width))
    rows.value_scale[:tokens].copy_(values.scale.view(tokens, width // GROUP))


def rows_from(layer: KeptRows, start: int) -> KeptRows:
    """The rows of a layer from one on, which is the first of a group."""
    scales = layer.key_scale, layer.value_scale
    key_scale, value_scale = (
        None if x is None else x[first:] for x, first in zip(scales, (start // GROUP, start), strict=True)
    )
    return KeptRows(layer.keys[start:], layer.values[start:], key_scale, value_scale)
