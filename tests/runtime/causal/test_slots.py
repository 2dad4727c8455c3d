"""Keys and values in slots are those that the cache gives, frame by frame, and they stay where they are."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from wanforge.configs.causal import CachePolicy, CausalConfig, policy
from wanforge.configs.model import load_model
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.causal import slots as slots_module
from wanforge.runtime.causal.slots import AT_ONCE, KVSlots, bytes_beside
from wanforge.runtime.reference.causal.cache import KVCache
from wanforge.runtime.reference.causal.chunks import Span, endless_chunks
from wanforge.runtime.reference.causal.kv_codes import KVFormat
from wanforge.runtime.reference.causal.network import KeysValues
from wanforge.runtime.reference.causal.window import View
from wanforge.runtime.reference.dit import rope_tables

LAYERS, GRID, HEADS = 2, (2, 3), 2
AREA = GRID[0] * GRID[1]
CUTS = {5, 11}
LATER = 3
"""The latent frames of a chunk after the first."""

POLICIES = {
    "none": policy("none"),
    "sliding_window": policy("sliding_window", 3),
    "sliding_window with a sink": policy("sliding_window", 4, 1),
    "rolling_sink": policy("rolling_sink", 4),
    "a rolling sink beside two": policy("rolling_sink", 5, 3),
    "infinity_rope": policy("infinity_rope", 4),
}
CHUNKS = 20


class Unshared(Backend):
    """A backend whose memory nobody else uses."""


def slots_for(kept: CachePolicy, form: KVFormat, dtype: torch.dtype) -> KVSlots:
    """Slots for as many frames as a chunk may see, with nothing in them that could be taken for a number."""
    frames = LATER * (kept.capacity or CHUNKS)
    past = [
        KeysValues(*(torch.full((1, frames * AREA, HEADS, 128), float("nan"), dtype=dtype) for _ in range(2)))
        for _ in range(LAYERS)
    ]
    return KVSlots(kept, GRID, past, Unshared(), form)  # type: ignore[abstract]


def own_of(chunk: Span, dtype: torch.dtype) -> list[KeysValues]:
    generator = torch.Generator().manual_seed(chunk.index)
    shape = (1, len(chunk) * AREA, HEADS, 128)
    return [KeysValues(*(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))) for _ in range(LAYERS)]


def seen_in(slots: KVSlots, layer: int, view: View) -> KeysValues:
    """What a layer sees, in the order of the view."""

    def gathered(x: Tensor) -> Tensor:
        return torch.cat([x[:, slots.slots[f] * AREA : (slots.slots[f] + 1) * AREA] for f in view.frames], 1)

    return KeysValues(*map(gathered, slots.past[layer]))


def rolled(kept: CachePolicy, form: KVFormat, dtype: torch.dtype, told: Callable[[KVSlots, View], None]) -> KVSlots:
    """Slots after many chunks, each of which saw what the cache says."""
    slots, cache = slots_for(kept, form, dtype), KVCache(kept, GRID, form=form)
    for chunk, _ in zip(endless_chunks(CausalConfig(1, LATER)), range(CHUNKS), strict=False):
        cut = chunk.index in CUTS
        view = slots.view(chunk, cut=cut)
        assert view == cache.view(chunk, cut=cut)
        assert list(slots.read(view)) == []
        for layer, expected in enumerate(cache.read(view)):
            found = seen_in(slots, layer, view)
            assert torch.equal(found.keys, expected.keys), (chunk, layer)
            assert torch.equal(found.values, expected.values), (chunk, layer)
        told(slots, view)
        own = own_of(chunk, dtype)
        for memory in (slots, cache):
            memory.append(chunk, own, cut=cut)
        for each in own:  # the next chunk's overwrite them
            each.keys.fill_(float("nan"))
            each.values.fill_(float("nan"))
    return slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", get_args(KVFormat))
@pytest.mark.parametrize("name", POLICIES)
def test_a_chunk_sees_in_slots_what_the_cache_gives(name: str, form: KVFormat, dtype: torch.dtype) -> None:
    def told(slots: KVSlots, view: View) -> None:
        seen = slots.seen(view)
        assert len(set(seen)) == len(view.frames)
        assert all(0 <= slot < slots.count for slot in seen)

    rolled(POLICIES[name], form, dtype, told)


@pytest.mark.parametrize("name", POLICIES)
def test_a_frame_stays_in_its_slot(name: str) -> None:
    """And the slots that are used first are the first ones, so that those that nothing was put into come last."""
    places: list[dict[int, int]] = []
    most: list[int] = []

    def told(slots: KVSlots, view: View) -> None:
        places.append({frame: slots.slots[frame] for frame in view.frames})
        most.append(max(most[-1:] + [slot + 1 for slot in slots.seen(view)], default=0))
        assert most[-1] <= max([len(each) for each in places])

    rolled(POLICIES[name], "native", torch.float32, told)
    for before, after in pairwise(places):
        assert all(after[frame] == before[frame] for frame in before.keys() & after.keys())


@pytest.mark.parametrize(("name", "moves"), [("none", False), ("sliding_window", False), ("infinity_rope", True)])
def test_only_keys_whose_time_has_changed_are_written_again(
    name: str, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[int, list[int]] = {}
    write = KVSlots._write

    def watched(slots: KVSlots, target: Tensor, frames: range, x: Tensor) -> None:
        written.setdefault(target.data_ptr(), []).extend(frames)
        write(slots, target, frames, x)

    monkeypatch.setattr(KVSlots, "_write", watched)
    slots = rolled(POLICIES[name], "native", torch.float32, lambda slots, view: None)
    frames = list(range(1 + LATER * (CHUNKS - 1)))
    for keys, values in slots.past:
        assert written[values.data_ptr()] == frames
        again = len(written[keys.data_ptr()]) - len(frames)
        assert (again > 0) == moves
    if moves:
        # The first chunk arrives at its last time when the window is full, and again after each cut.
        assert written[slots.past[0].keys.data_ptr()].count(0) <= CHUNKS // 2


@pytest.mark.parametrize("name", POLICIES)
def test_all_layers_rotate_by_the_same_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def watched(grid: tuple[int, int, int], device: torch.device, times: Sequence[int]) -> tuple[Tensor, Tensor]:
        made.append(grid[0])
        return rope_tables(grid, device, times)

    monkeypatch.setattr(slots_module, "rope_tables", watched)

    def told(slots: KVSlots, view: View) -> None:
        assert len(made) <= 1 + -(-len(view.frames) // AT_ONCE)  # what the chunk before left, and what this one sees
        assert max([AT_ONCE, *made]) == AT_ONCE
        made.clear()

    rolled(POLICIES[name], "native", torch.float32, told)
    assert made or POLICIES[name].moves


@pytest.mark.parametrize("form", get_args(KVFormat))
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_kept_beside_is_bounded(name: str, form: KVFormat) -> None:
    most: list[int] = [0]
    rolled(POLICIES[name], form, torch.float32, lambda slots, _: most.append(slots.nbytes))
    dit = load_model("tiny-causal").dit
    assert (dit.num_layers, dit.dim) == (LAYERS, HEADS * 128)
    bound = bytes_beside(POLICIES[name], form, dit, LATER * AREA, 4)
    assert max(most) <= bound
    assert (bound > 0) == POLICIES[name].moves
    assert 2 * max(most) >= bound
