"""Weights on a device that need not hold them all: slots of memory, each with one tenant at a time.

A *group* is the weights that one launch takes: those of one layer, mostly. Each has a slot; where groups share one,
they take turns, and the next one's copy starts as soon as the last launch of the one before is done. That is all there
is to it: everything resident is a slot for each group, two experts that swap are layers of both in the same slots,
streamed layers take turns in two slots, so that one is copied while the other computes. The results are the same
bits, for what a launch reads are the same bytes.

Who copies, and how one waits for it, is a `Mover`: a thread on the CPU, a stream beside the computing one on a GPU, a
clock in the memory plan, which so counts what really happens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from wanforge.engines.bundle.manifest import HOST_GRAPHS
from wanforge.engines.bundle.tensorfile import TensorSpec
from wanforge.runtime.dtypes import STORED
from wanforge.runtime.graphs import Graph
from wanforge.runtime.schedule import GraphRun, Schedule

ALIGNMENT = 256
"""Bytes: what a tensor's place in a slot is a multiple of; TensorRT wants its inputs so."""


class GroupName(NamedTuple):
    """Whose weights, and of which graph: a layer's ``block`` and ``cross_kv`` are two groups."""

    component: str
    prefix: str
    graph: str


@dataclass(frozen=True)
class Group:
    """The weights of a launch.

    Attributes:
        tensors: by name in the component's file.
        offsets: of each in its slot, in bytes.
        bytes: that it needs of a slot.
    """

    name: GroupName
    tensors: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    bytes: int

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors at their places in a slot's bytes."""
        return {
            name: memory[offset : offset + spec.nbytes].view(STORED[spec.dtype]).view(spec.shape)
            for (name, spec), offset in zip(self.tensors.items(), self.offsets.values(), strict=True)
        }


def aligned(size: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def group_name(graph_run: GraphRun) -> GroupName:
    """Of the weights that a launch takes."""
    return GroupName(graph_run.component, graph_run.prefix, graph_run.graph)


def groups_of(
    schedules: Iterable[Schedule], graphs: Mapping[str, Graph], specs: Callable[[str], Mapping[str, TensorSpec]]
) -> dict[GroupName, Group]:
    """Every group of some schedules, in the order of their first use. Graphs that carry their weights, or run on the
    host, have none.

    Args:
        specs: the tensors of a component.
    """
    found: dict[GroupName, Group] = {}
    known = cache(specs)
    for schedule in schedules:
        for graph_run in schedule.graph_runs():
            name, graph = group_name(graph_run), graphs[graph_run.graph]
            if name not in found and not graph.has_constants and graph.name not in HOST_GRAPHS:
                tensors = known(graph_run.component)
                found[name] = _group(name, {n: tensors[n] for n in (graph_run.prefix + w for w in graph.weights)})
    return found


def _group(name: GroupName, tensors: Mapping[str, TensorSpec]) -> Group:
    offsets, position = {}, 0
    for tensor, spec in tensors.items():
        offsets[tensor] = position
        position += aligned(spec.nbytes)
    return Group(name, tensors, offsets, position)


@dataclass(frozen=True)
class Turn:
    """A launch in its place among others.

    Attributes:
        group: its weights; None where it has none in a slot.
        follower: the next group that the slot is needed for, where that is another.
    """

    graph_run: GraphRun
    group: GroupName | None
    follower: GroupName | None


class Mover(Protocol):
    """Copies groups into slots, beside the computing."""

    def fetch(self, slot: int, group: Group) -> None:
        """Start to copy a group, once launches that were released read the slot no more."""
        ...

    def wait(self, slot: int) -> None:
        """Let what is launched from now on wait for the slot's copy."""
        ...

    def release(self, slot: int) -> None:
        """What was launched up to now is the last to read the slot's tenant."""
        ...


class ThreadMover:
    """Copies on the CPU in a thread of its own; launches there are done when they return.

    Args:
        source: the tensors of a component.
    """

    def __init__(self, slots: Sequence[Tensor], source: Callable[[str], Mapping[str, Tensor]]) -> None:
        self.slots, self.source = slots, source
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._copies: dict[int, Future[None]] = {}

    def fetch(self, slot: int, group: Group) -> None:
        self._copies[slot] = self._thread.submit(self._copy, slot, group)

    def _copy(self, slot: int, group: Group) -> None:
        tensors = self.source(group.name.component)
        with torch.inference_mode():
            for name, view in group.views(self.slots[slot]).items():
                view.copy_(tensors[name])

    def wait(self, slot: int) -> None:
        if slot in self._copies:
            self._copies.pop(slot).result()

    def release(self, slot: int) -> None:
        pass


class Residency:
    """Which group is in which slot, and what is to be copied next.

    Args:
        groups: every group there is.
        slots: the slot of each.
    """

    def __init__(self, groups: Mapping[GroupName, Group], slots: Mapping[GroupName, int], mover: Mover) -> None:
        self.groups, self.slots, self.mover = groups, slots, mover
        self._tenants: dict[int, GroupName] = {}
        self._lent: list[int] = []
        self._coming: set[int] = set()

    def lend(self, slots: Iterable[int]) -> None:
        """From now on these slots' memory is used for something else; that of those lent before is no more."""
        for slot in self._lent:
            self.mover.release(slot)
        self._lent = list(slots)
        for slot in self._lent:
            self._wait(slot)  # a copy on its way would land in what comes next
            self._tenants.pop(slot, None)

    def turns(self, schedule: Schedule) -> list["Turn"]:
        """A schedule's launches, each with what its slot is needed for next."""
        coming: dict[int, GroupName] = {}
        found = []
        for graph_run in reversed(list(schedule.graph_runs())):
            name = group_name(graph_run)
            slot = self.slots.get(name)
            if slot is None:
                found.append(Turn(graph_run, None, None))
                continue
            following = coming.get(slot, name)
            found.append(Turn(graph_run, name, following if following != name else None))
            coming[slot] = name
        return found[::-1]

    def begin(self, turns: Iterable["Turn"]) -> None:
        """Start copying what these launches need first, of every slot that has another tenant."""
        first: dict[int, GroupName] = {}
        for name in (turn.group for turn in turns if turn.group is not None):
            first.setdefault(self.slots[name], name)
        for slot, name in first.items():
            self._fetch(slot, name)

    def run(self, turn: "Turn", compute: Callable[[], None]) -> None:
        """Launch with the weights in their slot, and hand the slot on."""
        if turn.group is None:
            compute()
            return
        slot = self.slots[turn.group]
        self._fetch(slot, turn.group)
        self._wait(slot)
        compute()
        self.mover.release(slot)
        if turn.follower is not None:
            self._fetch(slot, turn.follower)

    def run_settled(self, turns: Iterable["Turn"], compute: Callable[[], None]) -> None:
        """Run launches that `are_settled` all at once."""
        compute()
        for slot in {self.slots[turn.group] for turn in turns if turn.group is not None}:
            self.mover.release(slot)

    def are_settled(self, turns: Iterable["Turn"]) -> bool:
        """Whether these launches find all their weights in place and copy nothing, now and when they are repeated."""
        return all(turn.group is None or (turn.follower is None and self._is_there(turn.group)) for turn in turns)

    def _is_there(self, name: GroupName) -> bool:
        slot = self.slots[name]
        return self._tenants.get(slot) == name and slot not in self._coming

    def _fetch(self, slot: int, name: GroupName) -> None:
        if self._tenants.get(slot) != name:
            self._tenants.pop(slot, None)
            self.mover.fetch(slot, self.groups[name])
            self._tenants[slot] = name
            self._coming.add(slot)

    def _wait(self, slot: int) -> None:
        """Wait for the slot's copy; one that failed leaves nothing there."""
        if slot in self._coming:
            self._coming.remove(slot)
            try:
                self.mover.wait(slot)
            except BaseException:
                self._tenants.pop(slot, None)
                raise
