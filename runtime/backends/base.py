"""What a backend is, and the session that runs a schedule on one."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.progress import Progress, silent
from wanforge.runtime.memory.arena import Memory, Runnable
from wanforge.runtime.schedule import GraphRun, Ref, Schedule


class Backend(Protocol):
    """Binds graphs to buffers and weights. A new backend implements this, and nothing else knows it is new."""

    name: str
    device: torch.device
    dtype: torch.dtype
    """Compute type."""
    memory: Memory
    text_rows_multiple: int = 1
    """Rows of text that are attended to are filled up to a multiple of this, with rows of no weight."""
    note: str = ""
    """What has to be said beside its times, where it does not compute what the others do."""

    def files(self) -> list[str]:
        """What of the bundle it opens, by path in it."""
        ...

    def prepare(self, clip: ClipShape) -> None:
        """Make ready for requests for this size and length of clip.

        Raises:
            ResourceError: there is too little memory for it.
            BundleError: the bundle lacks what it takes.
        """
        return

    def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        """What runs this launch, again and again, on these very buffers: contiguous, on `device`, in port order."""
        ...

    def program(self, schedule: Schedule, name: str, runnables: Sequence[Runnable]) -> list[Runnable]:
        """A program of bound launches as the backend would run it: one by one, or as one."""
        return list(runnables)

    def session(self, schedule: Schedule) -> "Session":
        """The schedule's buffers and programs, for a stage that begins."""
        return Session(self, schedule)

    def synchronise(self) -> None:
        """Wait until everything launched is done."""
        return


class Session:
    """The buffers of one schedule on one backend, and its programs bound to them.

    Buffers live as long as the session, at fixed addresses; launches are bound the first time a program runs. Where
    memory is shared between stages, a session that is made ends the one before.
    """

    def __init__(self, backend: Backend, schedule: Schedule) -> None:
        self.backend, self.schedule = backend, schedule
        self._bound: dict[str, list[Runnable]] = {}
        self.enter()

    def enter(self) -> None:
        """Take the stage's buffers, where an earlier run of it had them."""
        self._buffers = self.backend.memory.enter(self.schedule)

    def __getitem__(self, name: str) -> Tensor:
        """A buffer, to fill or to read."""
        return self._buffers[name]

    def run(self, program: str, stage: str = "", progress: Progress = silent) -> None:
        """Run every graph of a program in order.

        Args:
            progress: Told `stage`, how many runs are done, and how many there are.
        """
        runs = self.bound(program)
        for index, run in enumerate(runs):
            run()
            progress(stage, index + 1, len(runs))

    def bound(self, program: str) -> list[Runnable]:
        """A program's launches, ready to call one by one."""
        if program not in self._bound:
            self._bound[program] = self.backend.program(self.schedule, program, self.bind_anew(program))
        return self._bound[program]

    def bind_anew(self, program: str) -> list[Runnable]:
        """A program's launches bound anew, one for each."""
        runnables = [
            self.backend.bind(
                graph_run, [self._view(r) for r in graph_run.inputs], [self._view(r) for r in graph_run.outputs]
            )
            for graph_run in self.schedule.programs[program]
        ]
        return self.backend.memory.guarded(self.schedule, program, runnables)

    def _view(self, ref: Ref) -> Tensor:
        return self[ref.buffer] if ref.index is None else self[ref.buffer][ref.index]
