"""What backends on an arena share: a memory plan for each clip, sessions that are used again, and recorded programs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby
from threading import RLock

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import HOST_GRAPHS
from wanforge.errors import ResourceError
from wanforge.runtime.backends.base import Backend, Session
from wanforge.runtime.backends.recalling import Recalling
from wanforge.runtime.causal.kept import RECALL, KeptApart
from wanforge.runtime.graphs import graphs
from wanforge.runtime.memory.arena import Arena, Guarded, Memory, Runnable, Unbounded
from wanforge.runtime.memory.device import Device
from wanforge.runtime.memory.mover import CopyingMover
from wanforge.runtime.memory.plan import RESERVE, MemoryPlan, buffer_bytes, plan_request, request_schedules
from wanforge.runtime.memory.residency import GroupName
from wanforge.runtime.memory.weights import Weights
from wanforge.runtime.schedule import GraphRun, Schedule

KEPT_SESSIONS = 4
"""The most sessions of a stage that are kept, with their recorded programs."""

TEXT_ROWS = 64
"""Text rows are filled up to a multiple of this on a GPU, so that prompts of many lengths share what is recorded."""


class ArenaBackend(Backend):
    """A backend whose buffers and weights lie in an arena, on a GPU always and on the host where there is a budget.
    Without a budget the host computes on the mapped weights themselves.

    Args:
        budget: The most bytes of the device's memory to use; by default a GPU's free memory, less a reserve.
    """

    def __init__(self, bundle: Bundle, on: Device, dtype: torch.dtype, budget: float | None = None) -> None:
        self.bundle, self.on, self.device, self.dtype, self.budget = bundle, on, on.device, dtype, budget
        self.text_rows_multiple = TEXT_ROWS if on.has_memory else 1
        self.weights = Weights(bundle)
        self.graphs = graphs(bundle.model, bundle.recipe)
        self.memory: Memory = self._unbounded()
        self._clip: tuple[ClipShape, KeptApart | None] | None = None
        self.recalling = Recalling(by_kernel=self.device.type == "cuda")
        self._turn = RLock()
        self._sessions: dict[str, list[Session]] = {}
        self._packed: dict[GroupName, Tensor] = {}

    @property
    def is_planned(self) -> bool:
        """Whether a memory plan is made for each clip, as on a GPU always and on the host where there is a budget."""
        return self.on.has_memory or self.budget is not None

    def files(self) -> list[str]:
        return self.weights.files()

    def load(self, clip: ClipShape) -> None:
        """Load what runs the graphs of a clip."""

    def arena_bytes(self, clip: ClipShape) -> float:
        """The bytes that an arena may take, once the graphs of a clip are loaded."""
        free = self.on.free_bytes() - RESERVE
        return free if self.budget is None else min(free, self.budget)

    def workspaces(self) -> Mapping[str, int]:
        """The bytes of intermediate tensors that each graph keeps at the start of the arena."""
        return {}

    def place(self, workspace: Tensor) -> None:
        """Let graphs use the start of the arena for intermediate tensors."""

    def prepare(self, clip: ClipShape, kept: KeptApart | None = None) -> None:
        if (clip, kept) == self._clip or not self.is_planned:
            return
        self._sessions, self._clip = {}, None
        self.memory = self._unbounded()
        self.on.reclaim()
        self.load(clip)
        size, workspaces = self.arena_bytes(clip), self.workspaces()
        ported = self.ported(self.graphs)
        schedules = request_schedules(self.bundle.model, self.bundle.recipe, ported, clip, kept)
        itemsize, side_rank = self.dtype.itemsize, self.weights.side_rank
        plan = plan_request(self.bundle, self.graphs, schedules, workspaces, itemsize, size, side_rank)
        arena = Arena(plan, self.device, self.dtype, partial(self._mover, plan), self.own_weight)
        self.place(arena.bytes)
        self.memory, self._clip = arena, (clip, kept)

    def rebind(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.synchronise()
        rank, changed = self.weights.side_rank, self.weights.rebind(tensors)
        if self.weights.side_rank != rank:
            self._use_side_path()
            return
        for name in [name for name in self._packed if changed.get(name.component)]:
            del self._packed[name]
        if isinstance(self.memory, Arena):
            self.memory.residency.renew(changed)

    def _use_side_path(self) -> None:
        """Use the graphs that the rank of the side path asks for from now on. `prepare` lays the memory out for them;
        it can fail, so nothing here depends on it."""
        self.graphs = graphs(self.bundle.model, self.bundle.recipe, side_path=self.weights.side_rank > 0)
        self._packed.clear()
        self._sessions, self._clip = {}, None
        self.memory = self._unbounded()

    def own_weight(self, graph_run: GraphRun, name: str) -> Tensor:
        """A weight of a graph run by its name in the graph, in memory that is shared with no other."""
        return self.weights.of(graph_run, name).to(self.device)

    def _unbounded(self) -> Memory:
        return Unbounded(self.device, self.dtype, self.own_weight)

    def _mover(self, plan: MemoryPlan, slots: Sequence[Tensor]) -> CopyingMover:
        return CopyingMover(self.on, slots, self.weights.tensor, plan.returning(), self._packed)

    def session(self, schedule: Schedule) -> Session:
        """Start a stage. One of the last sessions with the same schedule is used again, with what it has recorded."""
        if not isinstance(self.memory, Arena):
            return super().session(schedule)
        kept = self._sessions.setdefault(schedule.stage, [])
        found = next((each for each in kept if each.schedule == schedule), None)
        if found is None:
            found = Session(self, schedule)
        else:
            kept.remove(found)
            found.enter()
        self._sessions[schedule.stage] = [found, *kept][:KEPT_SESSIONS]
        return found

    def part(self, prefix: str, schedule: Schedule) -> Session | None:
        arena = self.memory
        if not isinstance(arena, Arena) or arena.entered is None:
            return None
        stage = arena.entered
        entered = next((each for each in self._sessions.get(stage.stage, []) if each.schedule is stage), None)
        if entered is None or not self._has_room(prefix, schedule, stage):
            return None
        arena.parts[prefix] += 1
        return entered.part(prefix, schedule)

    def _has_room(self, prefix: str, schedule: Schedule, stage: Schedule) -> bool:
        """Whether a stage holds the buffers of a schedule. A text may be shorter than those that it has room for, but
        pictures are decoded at the size that the backend was prepared for."""
        rooms = {name: stage.buffers.get(prefix + name) for name in schedule.buffers}
        if schedule.stage == "decode":
            return rooms == schedule.buffers
        size = partial(buffer_bytes, itemsize=self.dtype.itemsize)
        return all(room and size(schedule.buffers[name]) <= size(room) for name, room in rooms.items())

    def lease(self, prefix: str = "") -> Callable[[], None]:
        arena = self.memory
        if not isinstance(arena, Arena):
            return super().lease()
        return partial(self._check_lease, arena, arena.entries, prefix, arena.parts[prefix])

    def _check_lease(self, arena: Arena, entries: int, prefix: str, taken: int) -> None:
        if self.memory is not arena or (arena.entries, arena.parts[prefix]) != (entries, taken):
            raise ResourceError(
                "another request has taken the memory of this one; within a limit of memory, and on a GPU, only one is "
                "served at a time, so finish a video before the next one is begun"
            )

    def turn(self) -> AbstractContextManager[object]:
        return self._turn if self.is_planned else nullcontext()

    def join(self) -> None:
        self.on.join()

    def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        if graph_run.graph == RECALL:
            return self.recalling.bind(inputs, outputs)
        return self.bind_graph(graph_run, inputs, outputs)

    def bind_graph(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        """Do what `bind` does, for a graph of the networks."""
        raise NotImplementedError

    def can_record(self, graph_run: GraphRun) -> bool:
        """Whether what a graph run launches can be recorded."""
        return True

    def program(self, schedule: Schedule, name: str, runnables: Sequence[Runnable]) -> list[Runnable]:
        """The graph runs of a program: recorded on a GPU, and apart on the host, so that each tells of its end."""
        if not self.on.has_memory:
            return list(runnables)
        guarded = [each for each in runnables if isinstance(each, Guarded)]
        found: list[Runnable] = []
        for is_on_host, some in groupby(guarded, lambda each: each.turn.graph_run.graph in HOST_GRAPHS):
            together = list(some)
            found += together if is_on_host else [Recorded(self.on, together, self.can_record)]
        return found or list(runnables)

    def synchronise(self) -> None:
        self.on.synchronise()


class Recorded:
    """Graph runs as a single call: they run one by one at first, then they are recorded, and then repeated. While
    weights are still being copied, they run one by one, because copying takes far longer than launching kernels."""

    def __init__(self, on: Device, runnables: Sequence[Guarded], can_record: Callable[[GraphRun], bool]) -> None:
        self.on, self.runnables, self.can_record = on, runnables, can_record
        self.residency = runnables[0].arena.residency
        turns = [each.turn for each in runnables]
        self.graph_runs = [turn.graph_run for turn in turns]
        self.places = self.residency.places(turns)
        self.has_run = False
        self.repeat: Runnable | None = None

    def __call__(self) -> None:
        self.runnables[0].check()
        places = self.places
        if places is None or not self.residency.are_settled(places) or not self._can_be_repeated():
            for runnable in self.runnables:
                runnable()
            self.has_run = True
            return
        if self.repeat is None:
            self.repeat = self.on.record(self._run_bare)
        self.residency.run_settled(places, self.repeat)

    def _can_be_repeated(self) -> bool:
        """Whether the graph runs are recorded, or can be. What runs for the first time may do more than launch."""
        return self.repeat is not None or (self.has_run and all(map(self.can_record, self.graph_runs)))

    def _run_bare(self) -> None:
        for runnable in self.runnables:
            runnable.bound()
