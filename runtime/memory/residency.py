"""Weights on a device that need not hold them all: slots of memory, each with one tenant at a time.

A *group* is the weights of one graph run, usually those of one layer. Each group has a slot. Groups that share a slot
take turns in it, and the copy of the next group starts as soon as the last graph run with the previous one is done.
This covers every case: weights that all stay resident have a slot for each group, two experts that replace each other
have their layers in the same slots, and streamed layers take turns in two slots, so that one is copied while the other
computes. The results are bit for bit the same, because a graph run always reads the same bytes.

A `Mover` does the copying and the waiting: one beside the computing (`mover`), and a clock for the memory plan, which
therefore counts what really happens.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import NamedTuple, Protocol

from torch import Tensor

from wanforge.engines.bundle.manifest import HOST_GRAPHS
from wanforge.engines.bundle.tensorfile import TensorSpec
from wanforge.runtime.dtypes import STORED
from wanforge.runtime.graphs import Graph
from wanforge.runtime.schedule import GraphRun, Schedule

ALIGNMENT = 256
"""Bytes of which a tensor's offset in its slot is a multiple, as TensorRT expects of its inputs."""


class GroupName(NamedTuple):
    """A group's component, layer prefix and graph: a layer's ``block`` and ``cross_kv`` are two groups."""

    component: str
    prefix: str
    graph: str


@dataclass(frozen=True)
class Group:
    """The weights of a graph run.

    Attributes:
        tensors: The tensors by their names in the component's file.
        offsets: The offset of each tensor in the slot, in bytes.
        bytes: The size of the slot that the group needs.
    """

    name: GroupName
    tensors: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    bytes: int

    def part(self, names: Collection[str]) -> "Group":
        """Some tensors of the group, at their places. It has another name, so that it is not taken for the group."""
        tensors = {name: spec for name, spec in self.tensors.items() if name in names}
        offsets = {name: self.offsets[name] for name in tensors}
        return Group(self.name._replace(graph=f"part of {self.name.graph}"), tensors, offsets, self.bytes)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors as views of a slot's memory."""
        return {
            name: memory[offset : offset + spec.nbytes].view(STORED[spec.dtype]).view(spec.shape)
            for (name, spec), offset in zip(self.tensors.items(), self.offsets.values(), strict=True)
        }


def aligned(size: int) -> int:
    """A size rounded up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def group_name(graph_run: GraphRun) -> GroupName:
    """The name of the group that a graph run uses."""
    return GroupName(graph_run.component, graph_run.prefix, graph_run.graph)


def groups_of(
    schedules: Iterable[Schedule], graphs: Mapping[str, Graph], specs: Callable[[str], Mapping[str, TensorSpec]]
) -> dict[GroupName, Group]:
    """Every group that some schedules use, in the order of their first use.

    Graphs that contain their weights as constants, or run on the host, have no group, and neither has what has no
    weights.

    Args:
        specs: Returns the tensors of a component.
    """
    found: dict[GroupName, Group] = {}
    known = cache(specs)
    for schedule in schedules:
        for graph_run in schedule.graph_runs():
            if not graph_run.component:
                continue
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
    """A graph run and its place in the order of runs.

    Attributes:
        group: Its weights; None where none of them are in a slot.
        follower: The next group that the slot is needed for, if that is another one.
    """

    graph_run: GraphRun
    group: GroupName | None
    follower: GroupName | None


class Mover(Protocol):
    """Copies groups into slots while the computing goes on."""

    def fetch(self, slot: int, group: Group) -> None:
        """Start copying a group once the graph runs before the slot's last release no longer read it."""
        ...

    def wait(self, slot: int) -> None:
        """Make everything launched from now on wait for the slot's copy."""
        ...

    def release(self, slots: Iterable[int]) -> None:
        """Note that no work launched after this point reads the tenants of some slots."""
        ...


class Residency:
    """Tracks which group is in which slot, and what has to be copied next.

    Args:
        groups: All groups.
        slots: The slot of each group.
    """

    def __init__(self, groups: Mapping[GroupName, Group], slots: Mapping[GroupName, int], mover: Mover) -> None:
        self.groups, self.slots, self.mover = groups, slots, mover
        self._tenants: dict[int, GroupName] = {}
        self._lent: list[int] = []
        self._coming: set[int] = set()

    def lend(self, slots: Iterable[int]) -> None:
        """Lend the memory of these slots to another use from now on; slots lent before are taken back."""
        self.mover.release(self._lent)
        self._lent = list(slots)
        for slot in self._lent:
            self._wait(slot)  # a copy still under way would overwrite what comes next
            self._tenants.pop(slot, None)

    def renew(self, changed: Mapping[str, Collection[str]]) -> None:
        """Copy those tensors anew, of the groups that are in their slots, that are others from now on. Nothing may be
        computing.

        Args:
            changed: The names of these tensors by component.
        """
        for slot, name in list(self._tenants.items()):
            group = self.groups[name]
            if names := group.tensors.keys() & changed.get(name.component, ()):
                self._wait(slot)
                self.mover.fetch(slot, group.part(names))
                self._coming.add(slot)

    def turns(self, schedule: Schedule) -> list["Turn"]:
        """The graph runs of a schedule, each with the group that its slot is needed for next."""
        coming = self._first(schedule.programs[step] for step in schedule.steps()) if schedule.repeats else {}
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
        """Start copying, into every slot that holds another group, the first group that these runs need there."""
        first: dict[int, GroupName] = {}
        for name in (turn.group for turn in turns if turn.group is not None):
            first.setdefault(self.slots[name], name)
        for slot, name in first.items():
            self._fetch(slot, name)

    def _first(self, programs: Iterable[Iterable[GraphRun]]) -> dict[int, GroupName]:
        """The group that each slot is needed for first by some programs."""
        first: dict[int, GroupName] = {}
        for name in map(group_name, chain.from_iterable(programs)):
            if name in self.slots:
                first.setdefault(self.slots[name], name)
        return first

    def run(self, turn: "Turn", compute: Callable[[], None]) -> None:
        """Compute with the weights in their slot, then start copying the slot's next group."""
        if turn.group is None:
            compute()
            return
        slot = self.slots[turn.group]
        self._fetch(slot, turn.group)
        self._wait(slot)
        compute()
        self.mover.release([slot])
        if turn.follower is not None:
            self._fetch(slot, turn.follower)

    def places(self, turns: Iterable["Turn"]) -> dict[int, GroupName] | None:
        """The group in each slot that graph runs use; None if these change when they run or are repeated."""
        used = [turn for turn in turns if turn.group is not None]
        if any(turn.follower is not None for turn in used):
            return None
        return {self.slots[turn.group]: turn.group for turn in used if turn.group is not None}

    def are_settled(self, places: Mapping[int, GroupName]) -> bool:
        """Whether these groups are in their slots, and nothing is being copied there."""
        return places.items() <= self._tenants.items() and self._coming.isdisjoint(places)

    def run_settled(self, places: Mapping[int, GroupName], compute: Callable[[], None]) -> None:
        """Compute, in a single call, graph runs whose groups are settled."""
        compute()
        self.mover.release(places)

    def _fetch(self, slot: int, name: GroupName) -> None:
        if self._tenants.get(slot) != name:
            self._tenants.pop(slot, None)
            self.mover.fetch(slot, self.groups[name])
            self._tenants[slot] = name
            self._coming.add(slot)

    def _wait(self, slot: int) -> None:
        """Wait for the slot's copy. A copy that failed leaves the slot empty."""
        if slot in self._coming:
            self._coming.remove(slot)
            try:
                self.mover.wait(slot)
            except BaseException:
                self._tenants.pop(slot, None)
                raise
