"""The layout of a GPU's memory during a request, and which weights stay there.

    offset 0                                                                              arena's end
    | workspace | buffers of the running stage …            … | slot n | …… | slot 1 | slot 0 |

A request consists of stages (text, image, denoising, decoding) that run one after the other, so they use the same
memory. Weights lie in slots, see `residency`. A stage that needs more than the memory before the slots overruns slots
that it does not use itself; their weights are fetched again when they are needed.

The ways to keep weights, fastest first: every group has a slot of its own; groups that a request uses only once (the
text encoder, the keys and values of the text) pass through two slots; the layers of the two experts share slots, so
that one expert replaces the other; layers pass through the two slots as well, except for as many as there is room for.
The layers that stay are evenly spread, which gives the others time to arrive.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.dtypes import BY_NAME
from wanforge.engines.sizes import named_sizes
from wanforge.errors import ResourceError
from wanforge.runtime.causal.kept import KeptApart
from wanforge.runtime.causal.schedule import stream_schedule
from wanforge.runtime.graphs import Graph
from wanforge.runtime.memory.residency import Group, GroupName, Residency, aligned, group_name, groups_of
from wanforge.runtime.memory.weights import specs
from wanforge.runtime.reference.steps import trajectory
from wanforge.runtime.schedule import (
    BufferSpec,
    GraphRun,
    Schedule,
    denoise_schedule,
    text_schedule,
    vae_schedule,
    with_preview,
)

RESERVE = 1_000_000_000
"""Bytes of a GPU left to the CUDA context, the library and a desktop: an assumption, not a measurement."""

RING = (0, 1)
"""The slots that streamed groups pass through."""

Slots = dict[GroupName, int]


@dataclass(frozen=True)
class StageMemory:
    """The memory of a stage, apart from weights.

    Attributes:
        workspace_bytes: Bytes of the intermediate tensors of its largest graph, since graphs run one after the other.
        buffer_bytes: Bytes of the tensors that its graphs pass on.
    """

    workspace_bytes: int
    buffer_bytes: int

    @property
    def extent(self) -> int:
        return aligned(self.workspace_bytes) + self.buffer_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """The layout of an arena.

    Attributes:
        residency: A description of how weights are kept.
        groups: All groups of weights that have a slot.
        slots: The slot of each group.
        places: Offset and size of each slot, in bytes.
    """

    residency: str
    stages: Mapping[str, StageMemory]
    groups: Mapping[GroupName, Group]
    slots: Mapping[GroupName, int]
    places: tuple[tuple[int, int], ...]
    arena_bytes: int

    @property
    def weight_bytes(self) -> int:
        """The bytes of all groups, whether they stay or are streamed."""
        return sum(group.bytes for group in self.groups.values())

    def overrun(self, stage: str) -> list[int]:
        """The slots whose memory a stage overruns."""
        return [slot for slot, (offset, _) in enumerate(self.places) if offset < self.stages[stage].extent]

    def returning(self) -> frozenset[GroupName]:
        """The groups that are copied repeatedly, because they share a slot or a stage overruns it."""
        tenants = Counter(self.slots.values())
        lost = {slot for stage in self.stages for slot in self.overrun(stage)}
        return frozenset(name for name, slot in self.slots.items() if tenants[slot] > 1 or slot in lost)

    def peak_bytes(self, stage: str) -> int:
        """The bytes of the arena in use while a stage runs: its own memory and the weights that stay."""
        lost = self.overrun(stage)
        kept = sum(size for slot, (_, size) in enumerate(self.places) if slot not in lost)
        return self.stages[stage].extent + kept

    def check(self, schedule: Schedule, itemsize: int) -> None:
        """Refuse a schedule that needs more than was planned, as one for a larger clip does."""
        stage, needed = self.stages[schedule.stage], buffers_bytes(schedule, itemsize)
        if needed > stage.buffer_bytes:
            raise RuntimeError(
                f"{schedule.stage} needs {needed} bytes of buffers where {stage.buffer_bytes} were planned for it"
            )

    def buffer_offsets(self, schedule: Schedule, itemsize: int) -> dict[str, int]:
        """The offset of each buffer of a schedule, in bytes."""
        offsets, position = {}, aligned(self.stages[schedule.stage].workspace_bytes)
        for name, spec in schedule.buffers.items():
            offsets[name] = position
            position += buffer_bytes(spec, itemsize)
        return offsets


@dataclass(frozen=True)
class Traffic:
    """The cost of moving weights for a request that follows one like it.

    Attributes:
        bytes: Bytes copied to the GPU.
        copy_seconds: Time that copying takes.
        stall_seconds: The part of that time in which nothing is computed; the rest is hidden behind computing.
    """

    bytes: int
    copy_seconds: float
    stall_seconds: float


def buffer_bytes(spec: BufferSpec, itemsize: int) -> int:
    """The bytes of a buffer, including the padding up to where the next may start.

    Args:
        itemsize: Bytes of one element of the compute type.
    """
    element_bytes = itemsize if spec.dtype == "compute" else BY_NAME[spec.dtype].bits // 8
    return aligned(prod(spec.shape) * element_bytes)


def buffers_bytes(schedule: Schedule, itemsize: int) -> int:
    """The bytes of all buffers of a schedule."""
    return sum(buffer_bytes(spec, itemsize) for spec in schedule.buffers.values())


def request_schedules(
    model: ModelConfig, recipe: Recipe, graphs: Mapping[str, Graph], clip: ClipShape, kept: KeptApart | None = None
) -> list[Schedule]:
    """The schedules of the largest request for a clip: with the longest prompt, the most steps and every key block.

    Args:
        clip: For a causal model, the shape of a video whose last chunk sees as much as any.
        kept: For a causal model, how a video keeps keys and values apart from where attention reads them, if it does.
    """
    decode = vae_schedule(graphs, clip, "decode")
    most = {name: size.most for name, size in named_sizes(model, recipe, clip).items()}
    text = text_schedule(model, graphs, most["prompt_tokens"])
    if model.causal:
        return [text, vae_schedule(graphs, clip, "encode"), stream_schedule(model, graphs, clip, kept), decode]
    experts = [step.expert for step in trajectory(model.sampler, model.sampler.most_steps).steps]
    denoise = denoise_schedule(
        model, graphs, clip, experts, context_rows=most["context_rows"], num_selected=most["num_selected"]
    )
    denoise = with_preview(denoise, graphs, clip)
    image = [vae_schedule(graphs, clip, "encode")] if model.task == "i2v" else []
    return [text, *image, denoise, decode]


def plan_request(
    bundle: Bundle,
    graphs: Mapping[str, Graph],
    schedules: Sequence[Schedule],
    workspaces: Mapping[str, int],
    itemsize: int,
    budget: float,
    side_rank: int = 0,
) -> MemoryPlan:
    """The memory plan for a bundle's requests, see `plan_memory`.

    Args:
        graphs: What the request runs; those with a side path have factors of the rank `side_rank`.
        schedules: Those of the largest request, see `request_schedules`.
    """
    groups = groups_of(schedules, graphs, partial(specs, bundle, side_rank=side_rank))
    return plan_memory(groups, schedules, workspaces, itemsize, budget)


def plan_memory(
    groups: Mapping[GroupName, Group],
    schedules: Sequence[Schedule],
    workspaces: Mapping[str, int],
    itemsize: int,
    budget: float,
) -> MemoryPlan:
    """Return the memory plan with the fastest way to keep weights that fits.

    Args:
        groups: All groups of weights of `schedules`, see `residency.groups_of`.
        workspaces: Bytes of the intermediate tensors of each graph that keeps them in the arena.
        itemsize: Bytes of one element of the compute type.
        budget: The most bytes that the arena may have.

    Raises:
        ResourceError: Nothing fits, not even with every layer streamed through two slots.
    """
    stages = {
        schedule.stage: StageMemory(
            max(workspaces.get(graph_run.graph, 0) for graph_run in schedule.graph_runs()),
            buffers_bytes(schedule, itemsize),
        )
        for schedule in schedules
    }
    used = {s.stage: [n for n in map(group_name, s.graph_runs()) if n in groups] for s in schedules}
    plan = None
    for residency, slots in ways(groups, schedules):
        plan = lay_out(residency, groups, slots, stages, used, budget)
        if plan.arena_bytes <= budget:
            return plan
    assert plan is not None
    tightest = max(stages, key=lambda name: stages[name].extent)
    raise ResourceError(
        f"this takes at least {plan.arena_bytes / 1e9:.3g} GB of memory with every layer streamed "
        f"({stages[tightest].extent / 1e9:.3g} GB of it for {tightest} itself), but only {max(0, budget) / 1e9:.3g} GB "
        "are available; make the clip smaller or shorter"
    )


def ways(groups: Mapping[GroupName, Group], schedules: Sequence[Schedule]) -> Iterator[tuple[str, Slots]]:
    """Every way to keep weights, fastest first: its description and the slot of each group."""
    of_steps = {
        group_name(graph_run)
        for schedule in schedules
        for program in schedule.steps()
        for graph_run in schedule.programs[program]
    }
    once = [name for name in groups if name not in of_steps]
    again = [name for name in groups if name in of_steps]
    yield "everything stays", {name: slot for slot, name in enumerate(groups)}
    ring = {name: RING[index % 2] for index, name in enumerate(once)}
    own = {name: len(RING) + index for index, name in enumerate(again)}
    yield "the denoiser stays, the rest is streamed", {**ring, **own}
    shared: dict[tuple[str, str], int] = {}
    for name in again:
        shared.setdefault((name.prefix, name.graph), len(shared))
    swapped = {name: len(RING) + shared[name.prefix, name.graph] for name in again}
    if swapped != own:
        yield "one expert stays, the other replaces it; the rest is streamed", {**ring, **swapped}
    layers = [place for place in shared if place[1] in ("block", "chunk_block")]
    for staying in reversed(range(len(layers))):
        passing = [place for index, place in enumerate(layers) if index * staying % len(layers) >= staying]
        streamed = {place: RING[index % 2] for index, place in enumerate(passing)}
        kept = {place: len(RING) + index for index, place in enumerate(p for p in shared if p not in streamed)}
        places = {**streamed, **kept}
        yield (
            f"{staying} of {len(layers)} layers stay, the rest is streamed",
            {**ring, **{name: places[name.prefix, name.graph] for name in again}},
        )


def lay_out(
    residency: str,
    groups: Mapping[GroupName, Group],
    slots: Mapping[GroupName, int],
    stages: Mapping[str, StageMemory],
    used: Mapping[str, Sequence[GroupName]],
    budget: float,
) -> MemoryPlan:
    """Place slots downwards from the arena's end, as far from the stages' own memory as `budget` allows.

    Args:
        used: The groups that each stage uses.
    """
    slot_bytes = [0] * (1 + max(slots.values()))
    for name, slot in slots.items():
        slot_bytes[slot] = max(slot_bytes[slot], groups[name].bytes)
    from_end = [sum(slot_bytes[: slot + 1]) for slot in range(len(slot_bytes))]
    deepest = {stage: max((from_end[slots[name]] for name in names), default=0) for stage, names in used.items()}
    least = max(from_end[-1], *(stages[stage].extent + deepest[stage] for stage in stages))
    most = max(stage.extent for stage in stages.values()) + from_end[-1]
    arena = max(least, min(most, int(budget) // aligned(1) * aligned(1)))
    places = tuple((arena - end, size) for end, size in zip(from_end, slot_bytes, strict=True))
    return MemoryPlan(residency, stages, groups, slots, places, arena)


class Clock:
    """A `Mover` that only counts the time of one copying engine and one computing engine.

    Args:
        bytes_per_second: Speed of copies to the GPU.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self.rate = bytes_per_second
        self.computing = self.copying = self.stalled = 0.0
        self.copied = 0
        self._free: dict[int, float] = {}
        self._ready: dict[int, float] = {}

    def fetch(self, slot: int, group: Group) -> None:
        self.copying = max(self.copying, self._free.get(slot, 0.0)) + group.bytes / self.rate
        self.copied += group.bytes
        self._ready[slot] = self.copying

    def wait(self, slot: int) -> None:
        waited = max(0.0, self._ready.get(slot, 0.0) - self.computing)
        self.stalled += waited
        self.computing += waited

    def release(self, slots: Iterable[int]) -> None:
        self._free |= dict.fromkeys(slots, self.computing)

    def compute(self, seconds: float) -> None:
        """Count the time of a graph run."""
        self.computing += seconds


def traffic(
    plan: MemoryPlan, schedules: Sequence[Schedule], bytes_per_second: float, seconds: Callable[[GraphRun], float]
) -> Traffic:
    """The cost of moving weights for the second of two equal requests.

    Args:
        seconds: Returns the computing time of a graph run.
    """
    clock = Clock(bytes_per_second)
    residency = Residency(plan.groups, plan.slots, clock)
    before = Traffic(0, 0.0, 0.0)
    for _ in range(2):
        before = Traffic(clock.copied, 0.0, clock.stalled)
        for schedule in schedules:
            residency.lend(plan.overrun(schedule.stage))
            turns = residency.turns(schedule)
            residency.begin(turns)
            for turn in turns:
                residency.run(turn, partial(clock.compute, seconds(turn.graph_run)))
    copied = clock.copied - before.bytes
    return Traffic(copied, copied / bytes_per_second, clock.stalled - before.stall_seconds)
