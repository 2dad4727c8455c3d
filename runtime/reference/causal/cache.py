"""The keys and values of the chunks that a stream remembers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanforge.configs.causal import CachePolicy
from wanforge.plugins.rms_norm_rope.reference import rotate
from wanforge.runtime.reference.causal.chunks import Span
from wanforge.runtime.reference.causal.kv_codes import Codes, KVFormat, decode, encode
from wanforge.runtime.reference.causal.network import KeysValues
from wanforge.runtime.reference.causal.window import View, Window
from wanforge.runtime.reference.dit import ROPE_PAIRS, rope_tables

Held = Tensor | Codes


@dataclass(frozen=True)
class Remembered:
    """One chunk in the cache.

    Attributes:
        times: The temporal indices at which its keys are rotated, one for each frame; empty if they are not rotated.
        layers: Keys and values of each layer, in the format of the cache.
    """

    chunk: Span
    times: tuple[int, ...]
    layers: tuple[tuple[Held, Held], ...]

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for layer in self.layers for held in layer)


class KVCache:
    """Keys and values by latent frame, seen through the window of a policy.

    A key is kept as it leaves its norm, and rotated when it is seen, or it is kept rotated and moved in time if it is
    seen at another one: the angles of the rotary embedding add up. The first is exact. The second saves the rotation
    where frames keep their times, and then it is exact as well.

    Args:
        grid: Rows and columns of a frame's tokens.
        keeps_rotated: Whether keys are kept rotated; by default they are if frames keep their times and the format is
            the compute type.
        form: The format of the numbers. Quantised keys are never kept rotated, because rotating mixes channels of
            different sizes.
    """

    def __init__(
        self,
        policy: CachePolicy,
        grid: tuple[int, int],
        *,
        form: KVFormat = "native",
        keeps_rotated: bool | None = None,
    ) -> None:
        self.window, self.grid, self.form = Window(policy), grid, form
        self.keeps_rotated = keeps_rotated if keeps_rotated is not None else form == "native" and not policy.moves
        assert form == "native" or not self.keeps_rotated
        self.chunks: list[Remembered] = []

    @property
    def nbytes(self) -> int:
        """The bytes of everything that is remembered."""
        return sum(remembered.nbytes for remembered in self.chunks)

    def view(self, chunk: Span, *, cut: bool = False) -> View:
        """What a chunk sees; see `Window.view`."""
        return self.window.view(chunk, cut=cut)

    def read(self, view: View) -> Iterator[KeysValues]:
        """Yield what each layer sees, keys rotated at the times of the view, ``[B, P, H, K]``; nothing if it sees
        nothing. A layer is read when it is asked for, so that there is never a second copy of all layers."""
        if view.frames:
            yield from (self._read_layer(layer, view) for layer in range(len(self.chunks[0].layers)))

    def append(self, chunk: Span, own: Sequence[KeysValues], *, cut: bool = False) -> None:
        """Remember a chunk by its own keys, not rotated, and values, and forget what the policy does not keep."""
        times = self.view(chunk, cut=cut).own if self.keeps_rotated else ()
        layers = tuple((self._encoded_keys(each.keys, times), self._encoded_values(each.values)) for each in own)
        self.chunks.append(Remembered(chunk, times, layers))
        self.window.append(chunk, cut=cut)
        held = self.window.held
        self.chunks = [each for each in self.chunks if not held.isdisjoint(each.chunk.frames)]

    def _encoded_keys(self, keys_BLHK: Tensor, times: tuple[int, ...]) -> Held:
        if times:
            return rotate(keys_BLHK, *self._tables(times, keys_BLHK.device))
        return keys_BLHK.clone() if self.form == "native" else encode(keys_BLHK, self.form, "tokens")

    def _encoded_values(self, values_BLHK: Tensor) -> Held:
        return values_BLHK.clone() if self.form == "native" else encode(values_BLHK, self.form, "channels")

    def _read_layer(self, layer: int, view: View) -> KeysValues:
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        for remembered in self.chunks:
            held_keys, held_values = remembered.layers[layer]
            keys |= self._by_frame(remembered.chunk, held_keys)
            values |= self._by_frame(remembered.chunk, held_values)
        seen = torch.cat([keys[frame] for frame in view.frames], 1)
        return KeysValues(self._at(seen, view), torch.cat([values[frame] for frame in view.frames], 1))

    def _by_frame(self, chunk: Span, held: Held) -> dict[int, Tensor]:
        whole = decode(held) if isinstance(held, Codes) else held
        return dict(zip(chunk.frames, whole.chunk(len(chunk), 1), strict=True))

    def _at(self, keys_BPHK: Tensor, view: View) -> Tensor:
        """The keys of a view rotated at its times."""
        if not self.keeps_rotated:
            return rotate(keys_BPHK, *self._tables(view.times, keys_BPHK.device))
        rotated_at = {f: t for each in self.chunks for f, t in zip(each.chunk.frames, each.times, strict=True)}
        shifts = [time - rotated_at[frame] for frame, time in zip(view.frames, view.times, strict=True)]
        return move_in_time(keys_BPHK, shifts) if any(shifts) else keys_BPHK

    def _tables(self, times: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        return rope_tables((len(times), *self.grid), device, times)


def move_in_time(keys_BPHK: Tensor, shifts: Sequence[int]) -> Tensor:
    """Keys that are rotated at some times, rotated at others instead. Only the channels of time change.

    Args:
        shifts: How many frames later each frame's keys are to be; all frames have equally many tokens.

    Source: Causal-rCM, rcm/utils/rope.py, rope_time_delta_ (docs/sources.md).
    """
    pairs, tokens = ROPE_PAIRS[0], keys_BPHK.shape[1] // len(shifts)
    tables = rope_tables((len(shifts), 1, 1), keys_BPHK.device, shifts)
    cos, sin = (table[:, :pairs].repeat_interleave(tokens, 0) for table in tables)
    moved = rotate(keys_BPHK[..., : 2 * pairs], cos, sin)
    return torch.cat((moved, keys_BPHK[..., 2 * pairs :]), -1)
