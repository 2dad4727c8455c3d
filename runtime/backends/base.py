"""What a backend is, and the session that runs a schedule on one."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from wanforge.runtime.graphs import ElementType
from wanforge.runtime.schedule import Launch, Ref, Schedule

Bound = Callable[[], None]


class Backend(Protocol):
    """Binds graphs to buffers and weights. A new backend implements this, and nothing else knows it is new."""

    name: str
    device: torch.device
    dtype: torch.dtype
    """Compute type."""

    def files(self) -> list[str]:
        """What of the bundle it opens, by path in it."""
        ...

    def bind(self, launch: Launch, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Bound:
        """What runs this launch, again and again, on these very buffers: contiguous, on `device`, in port order."""
        ...


class Session:
    """The buffers of one schedule on one backend, and its programs bound to them.

    Buffers live as long as the session, at fixed addresses; launches are bound the first time a program runs.
    """

    def __init__(self, backend: Backend, schedule: Schedule) -> None:
        self.backend, self.schedule = backend, schedule
        self._buffers: dict[str, Tensor] = {}
        self._bound: dict[str, list[Bound]] = {}

    def __getitem__(self, name: str) -> Tensor:
        """A buffer, to fill or to read."""
        if name not in self._buffers:
            spec = self.schedule.buffers[name]
            dtype = element_type(spec.dtype, self.backend.dtype)
            self._buffers[name] = torch.empty(spec.shape, dtype=dtype, device=self.backend.device)
        return self._buffers[name]

    def run(self, program: str) -> None:
        """Launch every graph of a program in order."""
        for launch in self.bound(program):
            launch()

    def bound(self, program: str) -> list[Bound]:
        """A program's launches, ready to call one by one."""
        if program not in self._bound:
            self._bound[program] = [
                self.backend.bind(
                    launch, [self._view(r) for r in launch.inputs], [self._view(r) for r in launch.outputs]
                )
                for launch in self.schedule.programs[program]
            ]
        return self._bound[program]

    def _view(self, ref: Ref) -> Tensor:
        return self[ref.buffer] if ref.index is None else self[ref.buffer][ref.index]


def element_type(name: ElementType, compute: torch.dtype) -> torch.dtype:
    """The type behind a port's or buffer's element type."""
    if name == "compute":
        return compute
    dtype: torch.dtype = getattr(torch, name)
    return dtype
