"""What a stream remembers is what the cache gives, frame by frame, whether attention reads keys and values where they
are kept or they are kept elsewhere; and frames stay where they are."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from wanforge.configs.causal import CachePolicy, CausalConfig, policy
from wanforge.configs.model import load_model
from wanforge.engines.bundle.shapes import concrete
from wanforge.plugins.recall.reference import KeptRows, recall
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.causal import kept_chunks as kept_module
from wanforge.runtime.causal.kept import KeptApart, kept_apart, recall_of
from wanforge.runtime.causal.kept_chunks import KeptChunks, Shelf
from wanforge.runtime.causal.slots import KVSlots
from wanforge.runtime.dtypes import element_type
from wanforge.runtime.reference.causal.cache import KVCache
from wanforge.runtime.reference.causal.chunks import Span, endless_chunks
from wanforge.runtime.reference.causal.kv_codes import KVFormat
from wanforge.runtime.reference.causal.network import KeysValues
from wanforge.runtime.reference.causal.window import View
from wanforge.runtime.reference.dit import rope_tables

LAYERS, GRID, HEADS = 2, (2, 3), 2
AREA, DIM = GRID[0] * GRID[1], HEADS * 128
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
IN_SLOTS = [name for name, kept in POLICIES.items() if not kept.moves]
CHUNKS = 20
Memory = KVSlots | KeptChunks


class Unshared(Backend):
    """A backend whose memory nobody else uses."""


def blank(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Nothing that could be taken for a number, where the type has such a value."""
    return torch.zeros(tuple(shape), dtype=dtype) if dtype in (torch.int8, torch.int32) else _nan(shape, dtype)


def _nan(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), float("nan")).to(dtype)


def memory_for(kept: CachePolicy, form: KVFormat, dtype: torch.dtype) -> Memory:
    """A memory for as many frames as a chunk may see."""
    apart, frames = kept_apart(kept, form, CHUNKS + 1), LATER * (kept.capacity or CHUNKS)
    if apart is not None:
        return KeptChunks(kept, GRID, apart, shelf_for(apart, frames, dtype), Unshared())  # type: ignore[abstract]
    shape = (1, frames * AREA, HEADS, 128)
    past = [KeysValues(*(blank(shape, dtype) for _ in range(2))) for _ in range(LAYERS)]
    return KVSlots(kept, GRID, past, Unshared())  # type: ignore[abstract]


def shelf_for(apart: KeptApart, frames: int, dtype: torch.dtype) -> Shelf:
    read = recall_of(apart, DIM)
    sizes = {"past_tokens": frames * AREA, "kept_groups": apart.groups(LATER * AREA)}

    def made() -> dict[str, Tensor]:
        ports = read.inputs
        return {port.name: blank(concrete(port.shape, sizes), element_type(port.dtype, dtype)) for port in ports}

    layers = [KeptRows(*(tensors[name] for name in read.kept)) for tensors in (made() for _ in range(LAYERS))]
    shared = made()
    return Shelf(layers, shared["places"], (shared["past_cos"], shared["past_sin"]))


def own_of(chunk: Span, dtype: torch.dtype) -> list[KeysValues]:
    generator = torch.Generator().manual_seed(chunk.index)
    shape = (1, len(chunk) * AREA, HEADS, 128)
    return [KeysValues(*(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))) for _ in range(LAYERS)]


def seen_in(memory: Memory, layer: int, view: View, dtype: torch.dtype) -> KeysValues:
    """What a layer sees, in the order of the view."""
    if isinstance(memory, KVSlots):
        return KeysValues(*(in_slots(memory, x, view) for x in memory.past[layer]))
    shelf, tokens = memory.shelf, len(view.frames) * AREA
    assert (shelf.places[tokens:] == -1).all()
    angles = shelf.angles[0][:tokens], shelf.angles[1][:tokens]
    found = recall(shelf.layers[layer], shelf.places[:tokens], angles, dtype)
    return KeysValues(*(x.view(1, tokens, HEADS, 128) for x in found))


def in_slots(slots: KVSlots, x: Tensor, view: View) -> Tensor:
    return torch.cat([x[:, slots.slots[f] * AREA : (slots.slots[f] + 1) * AREA] for f in view.frames], 1)


def rolled(kept: CachePolicy, form: KVFormat, dtype: torch.dtype, told: Callable[[Memory, View], None]) -> Memory:
    """A memory after many chunks, each of which saw what the cache says."""
    memory, cache = memory_for(kept, form, dtype), KVCache(kept, GRID, form=form)
    for chunk, _ in zip(endless_chunks(CausalConfig(1, LATER)), range(CHUNKS), strict=False):
        cut = chunk.index in CUTS
        view = memory.view(chunk, cut=cut)
        assert view == cache.view(chunk, cut=cut)
        assert list(memory.read(view)) == []
        for layer, expected in enumerate(cache.read(view)):
            found = seen_in(memory, layer, view, dtype)
            assert torch.equal(found.keys, expected.keys), (chunk, layer)
            assert torch.equal(found.values, expected.values), (chunk, layer)
        told(memory, view)
        own = own_of(chunk, dtype)
        for each in (memory, cache):
            each.append(chunk, own, cut=cut)
        for own_keys, own_values in own:  # the next chunk's overwrite them
            own_keys.fill_(float("nan"))
            own_values.fill_(float("nan"))
    return memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", get_args(KVFormat))
@pytest.mark.parametrize("name", POLICIES)
def test_a_chunk_sees_what_the_cache_gives(name: str, form: KVFormat, dtype: torch.dtype) -> None:
    def told(memory: Memory, view: View) -> None:
        seen = memory.seen(view)
        assert len(set(seen)) == len(view.frames)
        assert all(0 <= place < memory.count for place in seen)

    rolled(POLICIES[name], form, dtype, told)


@pytest.mark.parametrize("form", get_args(KVFormat))
@pytest.mark.parametrize("name", POLICIES)
def test_what_attention_reads_comes_first(name: str, form: KVFormat) -> None:
    """So what nothing was put into comes last, which attention does not read."""
    most: list[int] = []

    def told(memory: Memory, view: View) -> None:
        most.append(max(most[-1:] + [place + 1 for place in memory.seen(view)], default=0))
        assert most[-1] <= max([len(view.frames), *most[:-1]])

    rolled(POLICIES[name], form, torch.float32, told)


@pytest.mark.parametrize("name", IN_SLOTS)
def test_a_frame_stays_in_its_slot_and_is_written_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[dict[int, int]] = []
    written: dict[int, list[int]] = {}
    write = KVSlots._write

    def watched(slots: KVSlots, target: Tensor, frames: range, x: Tensor) -> None:
        written.setdefault(target.data_ptr(), []).extend(frames)
        write(slots, target, frames, x)

    def told(memory: Memory, view: View) -> None:
        assert isinstance(memory, KVSlots)
        places.append({frame: memory.slots[frame] for frame in view.frames})

    monkeypatch.setattr(KVSlots, "_write", watched)
    rolled(POLICIES[name], "native", torch.float32, told)
    for before, after in pairwise(places):
        assert all(after[frame] == before[frame] for frame in before.keys() & after.keys())
    assert len(written) == 2 * LAYERS
    assert all(frames == list(range(1 + LATER * (CHUNKS - 1))) for frames in written.values())


@pytest.mark.parametrize("form", get_args(KVFormat))
@pytest.mark.parametrize("name", POLICIES)
def test_a_chunk_that_is_kept_elsewhere_stays_where_it_is(name: str, form: KVFormat) -> None:
    """And all places are taken in turn, none of which is more than what the policy needs."""
    taken: list[dict[int, Span]] = []

    def told(memory: Memory, view: View) -> None:
        if isinstance(memory, KeptChunks):
            taken.append(dict(memory.chunks))

    memory = rolled(POLICIES[name], form, torch.float32, told)
    if not isinstance(memory, KeptChunks):
        assert form == "native"
        return
    for before, after in pairwise(taken):
        assert all(after[place] in (chunk, after[place]) for place, chunk in before.items() if place in after)
        stayed = {chunk: place for place, chunk in before.items()}.items() & {c: p for p, c in after.items()}.items()
        assert {chunk for chunk, _ in stayed} == set(before.values()) & set(after.values())
    assert {place for each in [*taken, memory.chunks] for place in each} == set(range(memory.kept.chunks))


@pytest.mark.parametrize("name", POLICIES)
def test_all_layers_rotate_by_the_same_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def watched(grid: tuple[int, int, int], device: torch.device, times: Sequence[int]) -> tuple[Tensor, Tensor]:
        made.append(grid[0])
        return rope_tables(grid, device, times)

    monkeypatch.setattr(kept_module, "rope_tables", watched)

    def told(memory: Memory, view: View) -> None:
        assert made == ([len(view.frames)] if view.frames else [])
        made.clear()

    rolled(POLICIES[name], "int8", torch.float32, told)


@pytest.mark.parametrize("form", get_args(KVFormat))
@pytest.mark.parametrize("name", POLICIES)
def test_bytes_are_those_of_the_buffers(name: str, form: KVFormat) -> None:
    kept, dit = POLICIES[name], load_model("tiny-causal").dit
    assert (dit.num_layers, dit.dim) == (LAYERS, DIM)
    apart = kept_apart(kept, form, CHUNKS + 1)
    assert (apart is None) == (form == "native" and not kept.moves)
    if apart is not None:
        rows = [x for layer in shelf_for(apart, 1, torch.float32).layers for x in layer if x is not None]
        assert sum(x.nbytes for x in rows) == apart.nbytes(dit, LATER * AREA, 4)


@pytest.mark.parametrize(
    ("name", "num_chunks", "chunks"),
    [
        *[("none", 8, 7), ("infinity_rope", None, 4), ("infinity_rope", 3, 2), ("infinity_rope", 1, 1)],
        *[("rolling_sink", None, 5), ("a rolling sink beside two", 40, 7)],
    ],
)
def test_there_is_room_for_what_a_video_remembers(name: str, num_chunks: int | None, chunks: int) -> None:
    assert kept_apart(POLICIES[name], "int8", num_chunks) == KeptApart("int8", chunks)
