"""The interface of a backend, and the session that runs a schedule on one."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.progress import Progress, silent
from wanforge.runtime.causal.kept import KeptApart
from wanforge.runtime.graphs import Graph
from wanforge.runtime.memory.arena import Memory, Runnable
from wanforge.runtime.reference.ranks.exchange import Alone, Exchange
from wanforge.runtime.schedule import GraphRun, Ref, Schedule


class Backend(Protocol):
    """Binds graphs to buffers and weights. Sessions and the pipeline work with any implementation of this interface."""

    name: str
    device: torch.device
    dtype: torch.dtype
    """The compute type."""
    memory: Memory
    text_rows_multiple: int = 1
    """The number of text rows that are attended to is filled up to a multiple of this, with rows of zero weight."""
    exchange: Exchange = Alone()
    """How this process exchanges tensors with those that compute the same clip on other GPUs."""
    note: str = ""
    """A remark that reports show beside its times, if it does not compute the same as the other backends."""

    def ported(self, graphs: Mapping[str, Graph]) -> Mapping[str, Graph]:
        """The graphs of a model with the ports that schedules for this backend bind."""
        return graphs

    def files(self) -> list[str]:
        """The paths in the bundle of the files that it opens."""
        ...

    def prepare(self, clip: ClipShape, kept: KeptApart | None = None) -> None:
        """Get ready for requests for clips of this size and length.

        Args:
            clip: For a causal model, the shape of a video whose last chunk sees as much as any.
            kept: For a causal model, how the video keeps keys and values apart from where attention reads them, if it
                does.

        Raises:
            ResourceError: There is too little memory for such a clip.
            BundleError: The bundle lacks what the backend needs for it.
        """
        return

    def rebind(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Compute with these weights in the place of the bundle's own from now on, and with no others. Sessions from
        before must not be used any more, and `prepare` must be called before the next one.

        Args:
            tensors: By component and canonical name; on the CPU, of the types and shapes of those that they stand for.
                Factors of products beside linears, in bfloat16, have a rank that `side_rank` returned.
        """
        ...

    def side_rank(self, needed: int, clip: ClipShape | None = None) -> int:
        """The rank of the products of low rank that can be computed beside the quantised linears.

        Args:
            needed: The least rank.
            clip: The size and length of the clip that is made with them; None if any will do.

        Returns:
            The rank that the factors are filled up to; 0 if there is no such side path.
        """
        return 0

    def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        """Return a function that runs a graph run as often as it is called, always on these buffers.

        Args:
            inputs, outputs: Tensors on `device`, in the order of the graph's ports; contiguous, unless `buffers` says
                otherwise.
        """
        ...

    def buffers(self, schedule: Schedule) -> Mapping[str, Tensor]:
        """The buffers of a stage that begins, by name. Those of the stage before it may be lost."""
        return self.memory.enter(schedule)

    def program(self, schedule: Schedule, name: str, runnables: Sequence[Runnable]) -> list[Runnable]:
        """The bound graph runs of a program as the backend runs them: one by one, or combined into one call."""
        return list(runnables)

    def session(self, schedule: Schedule) -> "Session":
        """Start a stage: return a session with the schedule's buffers and programs."""
        return Session(self, schedule)

    def part(self, prefix: str, schedule: Schedule) -> "Session | None":
        """The session of a schedule that is part of the stage that has the memory, if it is; see `Session.part`.
        Whoever had a session of this part before has lost what is in its buffers."""
        return None

    def lease(self, prefix: str = "") -> Callable[[], None]:
        """Return a function to call before the memory of the present stage is used again.

        Args:
            prefix: Of the part of the stage that is used; its memory can also be taken alone.

        Raises:
            ResourceError: (When it is called.) Another request has taken the memory.
        """
        return _kept

    def turn(self) -> AbstractContextManager[object]:
        """Within it, no other thread computes on memory that the threads share. It may be entered again."""
        return nullcontext()

    def join(self) -> None:
        """Let the calling thread compute, in one order with the thread that has made the backend."""
        return

    def synchronise(self) -> None:
        """Wait until all work that has been started is done."""
        return


def _kept() -> None:
    """Nobody can take memory that is not shared."""


KEPT_PARTS = 8
"""The most sessions that are kept of parts of another."""


class Session:
    """The buffers of one schedule on one backend, and its programs bound to them.

    Buffers live as long as the session, at fixed addresses. A program's graph runs are bound when it first runs. If
    stages share memory, creating a session ends the previous one.
    """

    def __init__(self, backend: Backend, schedule: Schedule) -> None:
        self.backend, self.schedule = backend, schedule
        self._bound: dict[str, list[Runnable]] = {}
        self._parts: list[SessionPart] = []
        self.enter()

    def enter(self) -> None:
        """Take the stage's buffers, at the addresses where an earlier run of the stage had them."""
        self._buffers = self.backend.buffers(self.schedule)

    @property
    def stage(self) -> Schedule:
        """The stage that has the memory while the session runs."""
        return self.schedule

    def __getitem__(self, name: str) -> Tensor:
        """Return a buffer, to fill or to read."""
        return self._buffers[name]

    def part(self, prefix: str, schedule: Schedule) -> "Session":
        """A session of another schedule in this session's memory: each of its buffers is the start of the one that is
        called the same here, after a prefix. The last ones are kept, with what was recorded of them."""
        found = next((each for each in self._parts if each.prefix == prefix and each.schedule == schedule), None)
        found = found or SessionPart(self, prefix, schedule)
        self._parts = [found, *(each for each in self._parts if each is not found)][:KEPT_PARTS]
        return found

    def run(self, program: str, stage: str = "", progress: Progress = silent) -> None:
        """Run every graph of a program in order.

        Args:
            progress: Called with `stage`, the number of graph runs that are done, and the number of all graph runs.
        """
        runs = self.bound(program)
        for index, run in enumerate(runs):
            run()
            progress(stage, index + 1, len(runs))

    def bound(self, program: str) -> list[Runnable]:
        """The runnables of a program, to be called in order."""
        if program not in self._bound:
            self._bound[program] = self.backend.program(self.schedule, program, self.bind_anew(program))
        return self._bound[program]

    def bind_anew(self, program: str) -> list[Runnable]:
        """Bind the graph runs of a program again and return one runnable for each."""
        runnables = [
            self.backend.bind(
                graph_run, [self._view(r) for r in graph_run.inputs], [self._view(r) for r in graph_run.outputs]
            )
            for graph_run in self.schedule.programs[program]
        ]
        return self.backend.memory.guarded(self.schedule, program, runnables, self.stage)

    def _view(self, ref: Ref) -> Tensor:
        return self[ref.buffer] if ref.index is None else self[ref.buffer][ref.index]


class SessionPart(Session):
    """A session in the memory of another, see `Session.part`."""

    def __init__(self, whole: Session, prefix: str, schedule: Schedule) -> None:
        self.whole, self.prefix = whole, prefix
        super().__init__(whole.backend, schedule)

    def enter(self) -> None:
        self._views: dict[str, Tensor] = {}

    @property
    def stage(self) -> Schedule:
        return self.whole.stage

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._views:
            whole, shape = self.whole[self.prefix + name], self.schedule.buffers[name].shape
            is_same = whole.shape == shape
            self._views[name] = whole if is_same else whole.flatten()[: math.prod(shape)].view(shape)
        return self._views[name]
