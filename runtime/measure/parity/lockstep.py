"""Runs two backends side by side: at every graph run the other backend gets the inputs that the reference had."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.runtime.backends.base import Backend, Session
from wanforge.runtime.causal.kept import KeptApart
from wanforge.runtime.memory.arena import Runnable
from wanforge.runtime.schedule import BufferSpec, GraphRun, Schedule

SELECTION = "selection"
"""The buffer of which only the length matters: the number of key blocks that a backend selects."""


@dataclass(frozen=True)
class Ports:
    """The inputs and outputs of one backend at a graph run."""

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]


Seen = Callable[[GraphRun, Ports, Ports], None]
"""Called with a graph run, and the ports of the reference and of the other backend."""


class Lockstep(Backend):
    """A backend that is the reference, and repeats every graph run on the other backend with the same inputs.

    Args:
        num_selected: How many key blocks the other backend selects; it may differ where the recipes differ.
    """

    name = "lockstep"

    def __init__(self, reference: Backend, other: Backend, num_selected: int, seen: Seen) -> None:
        self.reference, self.other, self.num_selected, self.seen = reference, other, num_selected, seen
        self.device, self.dtype, self.memory = reference.device, reference.dtype, reference.memory
        self.text_rows_multiple = other.text_rows_multiple

    def files(self) -> list[str]:
        return [*self.reference.files(), *self.other.files()]

    def prepare(self, clip: ClipShape, kept: KeptApart | None = None) -> None:
        for backend in (self.reference, self.other):
            backend.prepare(clip, kept)

    def synchronise(self) -> None:
        for backend in (self.reference, self.other):
            backend.synchronise()

    def rebind(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        for backend in (self.reference, self.other):
            backend.rebind(tensors)

    def side_rank(self, needed: int, clip: ClipShape | None = None) -> int:
        rank = self.other.side_rank(needed, clip)
        return rank and self.reference.side_rank(rank, clip)

    def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        return self.reference.bind(graph_run, inputs, outputs)

    def session(self, schedule: Schedule) -> Session:
        return LockstepSession(self, schedule)


class SteppedSession(Session):
    """A stage whose graph runs stay separate."""

    def bound(self, program: str) -> list[Runnable]:
        if program not in self._bound:
            self._bound[program] = self.bind_anew(program)
        return self._bound[program]

    def ports(self, graph_run: GraphRun) -> Ports:
        return Ports([self._view(r) for r in graph_run.inputs], [self._view(r) for r in graph_run.outputs])


class LockstepSession(SteppedSession):
    """A stage on both backends."""

    def __init__(self, lockstep: Lockstep, schedule: Schedule) -> None:
        super().__init__(lockstep, schedule)
        self.lockstep = lockstep
        buffers = dict(schedule.buffers)
        if SELECTION in buffers:
            buffers[SELECTION] = BufferSpec((lockstep.num_selected,), buffers[SELECTION].dtype)
        self.other = SteppedSession(lockstep.other, replace(schedule, buffers=buffers))

    def bind_anew(self, program: str) -> list[Runnable]:
        pairs = zip(super().bind_anew(program), self.other.bound(program), strict=True)
        return [partial(self._both, *each) for each in zip(self.schedule.programs[program], pairs, strict=True)]

    def _both(self, graph_run: GraphRun, runs: tuple[Runnable, Runnable]) -> None:
        mine, theirs = self.ports(graph_run), self.other.ports(graph_run)
        run_reference, run_other = runs
        run_reference()
        for ref, source, target in zip(graph_run.inputs, mine.inputs, theirs.inputs, strict=True):
            if ref.buffer == SELECTION:
                target.zero_()
            else:
                target.copy_(source)
        run_other()
        self.lockstep.synchronise()
        self.lockstep.seen(graph_run, mine, theirs)
