"""The memory of buffers and weights while a request runs: unlimited, or an arena laid out by a memory plan."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from wanforge.runtime.dtypes import element_type
from wanforge.runtime.memory.plan import MemoryPlan
from wanforge.runtime.memory.residency import ALIGNMENT, GroupName, Mover, Residency, Turn, group_name
from wanforge.runtime.schedule import BufferSpec, GraphRun, Schedule

Runnable = Callable[[], None]
Source = Callable[[GraphRun, str], Tensor]
"""Returns the weight of a graph run by its name in the graph."""


class FixedTensors(dict[str, Tensor]):
    """Tensors by name that keep their types, shapes and addresses, all of which are asked for once."""

    @cached_property
    def signature(self) -> str:
        """Equal for tensors with the same names, types, shapes, strides and device."""
        return repr([(name, x.dtype, x.shape, x.stride(), x.device) for name, x in self.items()])

    @cached_property
    def addresses(self) -> list[int]:
        return [x.data_ptr() for x in self.values()]


class Memory(Protocol):
    """Gives a session its buffers, and graph runs their weights."""

    def enter(self, schedule: Schedule) -> Mapping[str, Tensor]:
        """Return the buffers of a stage that begins. The buffers of the stage before it may be lost."""
        ...

    def weights(self, graph_run: GraphRun, names: Sequence[str]) -> FixedTensors:
        """The weights of a graph run by their names in the graph."""
        ...

    def guarded(
        self, schedule: Schedule, program: str, runnables: Sequence[Runnable], stage: Schedule
    ) -> list[Runnable]:
        """The graph runs of a program, wrapped so that their weights are in place when they run.

        Args:
            stage: What was entered: the schedule itself, or one that it is part of.
        """
        ...


class Unbounded:
    """Memory without a limit: each buffer has its own, and weights stay where the backend keeps them."""

    def __init__(self, device: torch.device, dtype: torch.dtype, weight: Source) -> None:
        self.device, self.dtype, self.weight = device, dtype, weight

    def enter(self, schedule: Schedule) -> Mapping[str, Tensor]:
        return _Buffers(schedule.buffers, self.device, self.dtype)

    def weights(self, graph_run: GraphRun, names: Sequence[str]) -> FixedTensors:
        return FixedTensors({name: self.weight(graph_run, name) for name in names})

    def guarded(
        self, schedule: Schedule, program: str, runnables: Sequence[Runnable], stage: Schedule
    ) -> list[Runnable]:
        return list(runnables)


class _Buffers(dict[str, Tensor]):
    """Buffers that are allocated when they are first asked for."""

    def __init__(self, specs: Mapping[str, BufferSpec], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.specs, self.device, self.dtype = specs, device, dtype

    def __missing__(self, name: str) -> Tensor:
        spec = self.specs[name]
        self[name] = torch.empty(spec.shape, dtype=element_type(spec.dtype, self.dtype), device=self.device)
        return self[name]


class Arena:
    """One piece of memory for all stages, laid out by a `MemoryPlan`.

    Args:
        mover: Creates what copies weights into the slots it is given.
        weight: Returns the weights that have no slot.

    Attributes:
        entered: The stage that has the memory now.
        entries: The number of stages that have begun.
        parts: How often a part of a stage was taken, by the prefix of its buffers.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        device: torch.device,
        dtype: torch.dtype,
        mover: Callable[[Sequence[Tensor]], Mover],
        weight: Source,
    ) -> None:
        self.plan, self.dtype, self.weight = plan, dtype, weight
        memory = torch.empty(plan.arena_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
        start = -memory.data_ptr() % ALIGNMENT
        self.bytes = memory[start : start + plan.arena_bytes]
        self.slots = [self.bytes[offset : offset + size] for offset, size in plan.places]
        self.residency = Residency(plan.groups, plan.slots, mover(self.slots))
        self.entered: Schedule | None = None
        self.entries = 0
        self.parts: Counter[str] = Counter()
        self._views: dict[GroupName, FixedTensors] = {}

    def enter(self, schedule: Schedule) -> Mapping[str, Tensor]:
        self.plan.check(schedule, self.dtype.itemsize)
        self.entered = schedule
        self.entries += 1
        self.residency.lend(self.plan.overrun(schedule.stage))
        self.residency.begin(self.residency.turns(schedule))
        offsets = self.plan.buffer_offsets(schedule, self.dtype.itemsize)
        return {name: self._buffer(spec, offsets[name]) for name, spec in schedule.buffers.items()}

    def _buffer(self, spec: BufferSpec, offset: int) -> Tensor:
        dtype = element_type(spec.dtype, self.dtype)
        size = torch.Size(spec.shape).numel() * dtype.itemsize
        return self.bytes[offset : offset + size].view(dtype).view(spec.shape)

    def weights(self, graph_run: GraphRun, names: Sequence[str]) -> FixedTensors:
        group = group_name(graph_run)
        if group not in self.plan.groups:
            return FixedTensors({name: self.weight(graph_run, name) for name in names})
        if group not in self._views:
            views = self.plan.groups[group].views(self.slots[self.plan.slots[group]])
            self._views[group] = FixedTensors({name: views[graph_run.prefix + name] for name in names})
        return self._views[group]

    def guarded(
        self, schedule: Schedule, program: str, runnables: Sequence[Runnable], stage: Schedule
    ) -> list[Runnable]:
        turns = iter(self.residency.turns(schedule))
        of_program = {name: [next(turns) for _ in each] for name, each in schedule.programs.items()}[program]
        return [Guarded(self, stage, turn, runnable) for turn, runnable in zip(of_program, runnables, strict=True)]


@dataclass(frozen=True)
class Guarded:
    """A bound graph run whose weights are in their slot when it runs."""

    arena: Arena
    stage: Schedule
    turn: Turn
    bound: Runnable

    def __call__(self) -> None:
        self.check()
        self.arena.residency.run(self.turn, self.bound)

    def check(self) -> None:
        """Refuse to run if the memory has since been given to another stage."""
        if self.arena.entered is not self.stage:
            raise RuntimeError(f"the memory of {self.stage.stage} has gone to another stage")
