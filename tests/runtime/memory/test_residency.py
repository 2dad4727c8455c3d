"""Weights that take turns in memory: the order of copies and graph runs, and the memory plan that counts their cost."""

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from threading import Event, Timer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.tensorfile import TensorSpec
from wanforge.errors import ResourceError
from wanforge.exporter.checkpoint.layout import layout
from wanforge.runtime.backends import create_backend
from wanforge.runtime.graphs import graphs
from wanforge.runtime.memory.arena import Arena
from wanforge.runtime.memory.cuda import Cuda
from wanforge.runtime.memory.device import Host
from wanforge.runtime.memory.mover import CopyingMover
from wanforge.runtime.memory.plan import RING, MemoryPlan, lay_out, plan_memory, request_schedules, traffic, ways
from wanforge.runtime.memory.residency import ALIGNMENT, Group, GroupName, Residency, group_name, groups_of
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings
from wanforge.runtime.schedule import GraphRun, Schedule

LARGE, CLIP = "turbowan2.2-i2v-a14b-720p", ClipShape(1280, 720, 81)
MODEL, RECIPE = load_model(LARGE), load_recipe("w8a8")
GRAPHS = graphs(MODEL, RECIPE)
SCHEDULES = request_schedules(MODEL, RECIPE, GRAPHS, CLIP)
GROUPS = groups_of(SCHEDULES, GRAPHS, lambda component: layout(component, MODEL, RECIPE))
WORKSPACES = {"block": 9_290_000_000, "vae_decode_next": 4_612_000_000, "vae_encode_next": 4_609_000_000}


def graph_run(layer: int) -> GraphRun:
    return GraphRun("block", (), (), "dit", f"blocks.{layer}.")


def name(layer: int) -> GroupName:
    return group_name(graph_run(layer))


class Movements:
    """A mover that checks what a real one relies on and records what happens."""

    def __init__(self) -> None:
        self.holds: dict[int, GroupName] = {}
        self.coming: dict[int, GroupName] = {}
        self.said: list[str] = []

    def fetch(self, slot: int, group: Group) -> None:
        self.coming[slot] = group.name
        self.said.append(f"fetch {group.name.prefix}{slot}")

    def wait(self, slot: int) -> None:
        if slot in self.coming:
            self.holds[slot] = self.coming.pop(slot)

    def release(self, slots: Iterable[int]) -> None:
        self.said += [f"release {slot}" for slot in slots]

    def graph_run(self, slot: int, wanted: GroupName) -> None:
        assert slot not in self.coming
        assert self.holds[slot] == wanted
        self.said.append(f"run {wanted.prefix}")


def group(layer: int) -> Group:
    return Group(name(layer), {"w": TensorSpec("I8", (256,))}, {"w": 0}, 256)


@given(
    order=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    slots=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    evicted=st.integers(0, 29),
)
@settings(deadline=None)
def test_every_graph_run_finds_its_weights(order: list[int], slots: list[int], evicted: int) -> None:
    mover = Movements()
    placed = {name(layer): slots[layer] for layer in range(5)}
    residency = Residency({name(layer): group(layer) for layer in range(5)}, placed, mover)
    schedule = Schedule("denoise", {}, {"step.0": tuple(map(graph_run, order))})
    turns = residency.turns(schedule)
    residency.begin(turns)
    for index, turn in enumerate(turns):
        if index == evicted:
            residency.lend([0, 1])
        assert turn.group is not None
        residency.run(turn, partial(mover.graph_run, placed[turn.group], turn.group))
    runs = [said for said in mover.said if said.startswith("run")]
    assert runs == [f"run {name(layer).prefix}" for layer in order]


def test_the_next_layer_is_copied_while_one_computes() -> None:
    mover = Movements()
    placed = {name(layer): layer % 2 for layer in range(4)}
    residency = Residency({name(layer): group(layer) for layer in range(4)}, placed, mover)
    turns = residency.turns(Schedule("denoise", {}, {"step.0": tuple(map(graph_run, [0, 1, 2, 3]))}))
    residency.begin(turns)
    for turn in turns:
        assert turn.group is not None
        residency.run(turn, partial(mover.graph_run, placed[turn.group], turn.group))
    assert mover.said == [
        *("fetch blocks.0.0", "fetch blocks.1.1"),
        *("run blocks.0.", "release 0", "fetch blocks.2.0", "run blocks.1.", "release 1", "fetch blocks.3.1"),
        *("run blocks.2.", "release 0", "run blocks.3.", "release 1"),
    ]
    assert residency.places(turns) is None
    places = residency.places(residency.turns(Schedule("denoise", {}, {"step.0": (graph_run(2), graph_run(3))})))
    assert places == {0: name(2), 1: name(3)}
    assert residency.are_settled(places)
    residency.lend([1])
    assert not residency.are_settled(places)


def test_a_copy_that_fails_leaves_nothing_behind() -> None:
    class Failing(Movements):
        fails = 1

        def wait(self, slot: int) -> None:
            if self.fails:
                self.fails -= 1
                raise OSError("the file is gone")
            super().wait(slot)

    mover = Failing()
    residency = Residency({name(0): group(0)}, {name(0): 0}, mover)
    turns = residency.turns(Schedule("denoise", {}, {"step.0": (graph_run(0),)}))
    with pytest.raises(OSError, match="gone"):
        residency.run(turns[0], lambda: None)
    residency.run(turns[0], partial(mover.graph_run, 0, name(0)))
    assert mover.said[-2:] == ["run blocks.0.", "release 0"]
    assert mover.said.count("fetch blocks.0.0") == 2


def test_a_slot_that_was_lent_is_filled_after_what_used_its_memory() -> None:
    mover = Movements()
    residency = Residency({name(0): group(0)}, {name(0): 0}, mover)
    turns = residency.turns(Schedule("denoise", {}, {"step.0": (graph_run(0),)}))
    residency.begin(turns)
    residency.lend([0])
    mover.said.append("another stage")
    residency.lend([])
    residency.begin(turns)
    assert mover.said == ["fetch blocks.0.0", "another stage", "release 0", "fetch blocks.0.0"]


def test_tensors_lie_apart_and_aligned() -> None:
    one = next(group for group in GROUPS.values() if group.name.graph == "block")
    position = 0
    for tensor, spec in one.tensors.items():
        assert one.offsets[tensor] % ALIGNMENT == 0
        assert one.offsets[tensor] >= position
        position = one.offsets[tensor] + spec.nbytes
    assert position <= one.bytes < position + ALIGNMENT


def test_the_embedding_table_and_the_vae_have_no_slot() -> None:
    assert {name.graph for name in GROUPS} == set(GRAPHS) - {"text_embed"} - {g for g in GRAPHS if g.startswith("vae")}


def plan(gib: float) -> MemoryPlan:
    return plan_memory(GROUPS, SCHEDULES, WORKSPACES, 2, gib * 2**30 - 1.55e9)


PLANNED = plan(16)


@pytest.mark.parametrize(
    ("gib", "residency"),
    [
        (80, "everything stays"),
        (48, "the denoiser stays, the rest is streamed"),
        (32, "one expert stays, the other replaces it; the rest is streamed"),
        (24, "38 of 40 layers stay, the rest is streamed"),
        (16, "10 of 40 layers stay, the rest is streamed"),
    ],
)
def test_the_largest_model_fits_every_size_of_gpu(gib: float, residency: str) -> None:
    found = plan(gib)
    assert found.residency == residency
    assert found.arena_bytes <= gib * 2**30 - 1.55e9
    for stage in found.stages:
        assert found.peak_bytes(stage) <= found.arena_bytes


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ResourceError, match=r"at least 13\.4 GB .* \(13\.4 GB of it for decode itself\), but only 11\.3 GB"
    ):
        plan(12)


def test_nothing_lies_on_anything_that_runs_with_it() -> None:
    for residency, slots in ways(GROUPS, SCHEDULES):
        stages = PLANNED.stages
        of = {s.stage: [n for n in map(group_name, s.graph_runs()) if n in GROUPS] for s in SCHEDULES}
        found = lay_out(residency, GROUPS, slots, stages, of, 0)
        places = sorted(found.places)
        assert all(a + size <= b for (a, size), (b, _) in pairwise(places))
        assert places[-1][0] + places[-1][1] <= found.arena_bytes
        assert all(offset % ALIGNMENT == 0 for offset, _ in places)
        for name, slot in slots.items():
            assert GROUPS[name].bytes <= found.places[slot][1]
        for stage, names in of.items():
            assert not {slots[name] for name in names} & set(found.overrun(stage)), (residency, stage)


def test_buffers_follow_each_other_behind_the_workspace() -> None:
    for schedule in SCHEDULES:
        offsets = PLANNED.buffer_offsets(schedule, 2)
        assert list(offsets) == list(schedule.buffers)
        assert min(offsets.values()) >= PLANNED.stages[schedule.stage].workspace_bytes
        assert sorted(offsets.values()) == list(offsets.values())


def test_what_a_request_copies_is_what_does_not_stay() -> None:
    size = dict.fromkeys(("text_encoder", "dit.high", "dit.low"), 0)
    for each in GROUPS.values():
        size[each.name.component] += each.bytes
    everything = sum(size.values())
    swapped = traffic(plan(32), SCHEDULES, 25e9, lambda _: 0.0)
    assert traffic(plan(80), SCHEDULES, 25e9, lambda _: 0.0).bytes == 0
    assert swapped.bytes == everything
    assert swapped.copy_seconds == pytest.approx(everything / 25e9)
    streamed = traffic(plan(16), SCHEDULES, 25e9, lambda _: 0.0)
    layers = sum(group.bytes for group in GROUPS.values() if group.name.graph == "block")
    # Of each expert's 40 layers, 30 are streamed in each of its two steps; the rest of the expert is copied once.
    assert streamed.bytes == pytest.approx(everything + layers * 30 / 40, rel=0.02)


def test_copies_hide_behind_computing_that_takes_longer() -> None:
    def seconds(graph_run: GraphRun) -> float:
        return 0.1 if graph_run.graph == "block" else 0.0

    idle, busy = (traffic(plan(16), SCHEDULES, 25e9, f) for f in (lambda _: 0.0, seconds))
    assert idle.stall_seconds == pytest.approx(idle.copy_seconds, rel=0.1)
    assert busy.bytes == idle.bytes
    assert busy.stall_seconds < 0.4 * idle.stall_seconds
    # The remaining copies come before the first layer, with nothing to hide behind: the text encoder, the text's keys
    # and values, layers that decoding overwrote, and the first layer that passes through each slot.
    early = sum(group.bytes for group in GROUPS.values() if group.name.graph not in ("block", "stem", "head"))
    lost = sum(PLANNED.places[slot][1] for slot in (*PLANNED.overrun("decode"), *RING))
    assert 0.95 * early / 25e9 <= busy.stall_seconds <= 1.05 * (early + lost) / 25e9


class Streams(Host):
    """A record of what a mover asks of a device."""

    def __init__(self) -> None:
        super().__init__()
        self.may_pin = Event()
        self.may_pin.set()
        self.said: list[str] = []
        self.events = 0
        self.pinned_bytes = 0

    def event(self, said: str) -> str:
        self.events += 1
        self.said.append(f"{said} -> e{self.events}")
        return f"e{self.events}"

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after: str | None) -> str:
        for target, source in pairs:
            target.copy_(source)
        return self.event(f"copy {len(pairs)} after {after}")

    def mark(self) -> str:
        return self.event("mark")

    def wait(self, event: str) -> None:
        self.said.append(f"wait {event}")

    def pinned(self, size: int) -> torch.Tensor:
        assert self.may_pin.wait(10)
        self.pinned_bytes += size
        return torch.empty(size, dtype=torch.uint8)


@pytest.mark.parametrize("is_returning", [False, True])
def test_a_copy_waits_for_the_last_graph_run_that_reads_its_slot(
    is_returning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.arange(4, dtype=torch.int8), "b": torch.ones(300)}
    specs = {"a": TensorSpec("I8", (4,)), "b": TensorSpec("F32", (300,))}
    both = Group(name(0), specs, {"a": 0, "b": 256}, 1536)
    cuda, slot = Streams(), torch.zeros(2048, dtype=torch.uint8)
    returning = frozenset({name(0)}) if is_returning else frozenset[GroupName]()
    mover = CopyingMover(cuda, [slot], lambda component, name: tensors[name], returning, {})
    mover.fetch(0, both)
    mover.wait(0)
    mover.wait(0)
    mover.release([0])
    mover.fetch(0, both)
    mover.wait(0)
    pieces = 1 if is_returning else 2
    assert cuda.said == [
        *("mark -> e1", f"copy {pieces} after e1 -> e2", "wait e2"),
        *("mark -> e3", f"copy {pieces} after e3 -> e4", "wait e4"),
    ]
    assert cuda.pinned_bytes == (1536 if is_returning else 0)
    views = both.views(slot)
    assert torch.equal(views["a"], tensors["a"])
    assert torch.equal(views["b"], tensors["b"])
    monkeypatch.setattr("wanforge.runtime.memory.mover.available_bytes", lambda: 0)
    crowded = CopyingMover(cuda, [slot], lambda component, name: tensors[name], returning, {})
    crowded.fetch(0, both)
    crowded.wait(0)
    assert cuda.pinned_bytes == (1536 if is_returning else 0)


def test_launching_goes_on_while_weights_are_packed() -> None:
    """Packing a layer takes tens of milliseconds, in which the layers before it can be launched."""
    cuda, first, second = Streams(), group(0), group(1)
    tensors = {"w": torch.arange(-128, 128, dtype=torch.int8)}
    slots = [torch.zeros(256, dtype=torch.uint8) for _ in range(2)]
    mover = CopyingMover(cuda, slots, lambda component, name: tensors[name], frozenset({name(1)}), {})
    mover.fetch(0, first)
    cuda.may_pin.clear()
    mover.fetch(1, second)
    mover.wait(0)
    mover.release([0])
    assert cuda.said == ["mark -> e1", "copy 1 after e1 -> e2", "wait e2", "mark -> e3"]
    cuda.may_pin.set()
    mover.wait(1)
    assert cuda.said[4:] == ["copy 1 after e1 -> e4", "wait e4"]
    assert torch.equal(slots[1].view(torch.int8), tensors["w"])


def test_waiting_for_everything_includes_copies_that_are_being_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is given back while a copy into it is still to come would be overwritten in its next use."""
    said: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            said.append("synchronise")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: Stream())
    for called in ("set_stream", "set_device", "empty_cache"):
        monkeypatch.setattr(f"torch.cuda.{called}", lambda *arguments: None)
    for asked in ("current_device", "graph_pool_handle"):
        monkeypatch.setattr(f"torch.cuda.{asked}", lambda: 0)
    cuda, goes_on = Cuda(), Event()

    def prepare() -> None:
        assert goes_on.wait(10)
        said.append("copy")

    cuda.prepare(prepare)
    Timer(0.05, goes_on.set).start()
    cuda.reclaim()
    assert said == ["copy", "synchronise", "synchronise"]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "residency"), [(0.96, "everything stays"), (0.82, "3 of 5"), (0.65, "0 of 5")])
def test_onnx_runtime_gives_the_same_bits_however_little_memory_there_is(
    deep_bundle: Bundle, share: float, residency: str
) -> None:
    clip = ClipShape(64, 64, 5)

    def frames(budget: float | None) -> tuple[torch.Tensor, Arena | None]:
        backend = create_backend("ort", deep_bundle, budget=budget)
        pipeline = Pipeline(deep_bundle, backend)
        found = []
        for prompt in ("a kite", "a red kite over the sea"):
            job = pipeline.check(Request(prompt, clip, topk=1.0))
            found += list(pipeline.frames(pipeline.latents(job, Timings()), clip, Timings()))
        return torch.stack(found), backend.memory if isinstance(backend.memory, Arena) else None

    wanted, _ = frames(None)
    _, whole = frames(1e9)
    assert whole is not None
    found, arena = frames(share * whole.plan.arena_bytes)
    assert arena is not None
    assert residency in arena.plan.residency
    assert arena.plan.overrun("decode"), "decoding overwrites no weights, so the second request has none to fetch again"
    assert arena.plan.arena_bytes <= share * whole.plan.arena_bytes
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_clips_of_two_sizes_do_not_meet_in_memory(deep_bundle: Bundle) -> None:
    """Both are checked before either runs, as happens with a file of prompts."""
    large, small = ClipShape(64, 64, 5), ClipShape(32, 32, 5)

    def frames(budget: float | None) -> list[torch.Tensor]:
        pipeline = Pipeline(deep_bundle, create_backend("ort", deep_bundle, budget=budget))
        jobs = [pipeline.check(Request("a kite", clip, topk=1.0)) for clip in (large, small)]
        return [
            torch.stack(list(pipeline.frames(pipeline.latents(job, Timings()), job.request.shape, Timings())))
            for job in jobs
        ]

    for found, wanted in zip(frames(20e6), frames(None), strict=True):
        assert torch.equal(found, wanted)


def test_a_plan_is_for_its_clip() -> None:
    larger = request_schedules(MODEL, RECIPE, GRAPHS, ClipShape(1280, 720, 85))
    with pytest.raises(RuntimeError, match=r"denoise needs \d+ bytes of buffers where \d+ were planned for it"):
        PLANNED.check(next(schedule for schedule in larger if schedule.stage == "denoise"), 2)
