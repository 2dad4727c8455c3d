"""The device that is measured: a GPU or, in a rehearsal, the machine for PTX. Nothing else differs between the
two."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol
from unittest import mock

import torch

from tools.ptx.bench import Bench
from wanforge.configs.targets import Target, load_targets
from wanforge.plugins.launching import driver
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.launch import Launch, Specialisation, architecture_of
from wanforge.runtime.measure.kernels import cases, timing
from wanforge.runtime.measure.kernels.timing import CudaTimer, Run, Timer
from wanforge.runtime.measure.machine import target_of

REHEARSED = "h200"
"""The target whose architecture and peaks a rehearsal uses."""


class Device(Protocol):
    """What the parts know of the device.

    Attributes:
        device: Where its tensors are.
        target: Its peaks, where they are known.
        timer: Measures a run.
    """

    device: torch.device
    sm: int
    target: Target | None
    timer: Timer

    def entered(self) -> AbstractContextManager[object]:
        """Within the ``with`` block, kernels run on this device."""
        ...

    def launch(self, launch: Launch) -> None:
        """Put a launch on the device."""
        ...

    def synchronise(self) -> None:
        """Wait until all work is done."""
        ...

    def peak_bytes(self) -> int | None:
        """The most memory that tensors took since this was last asked."""
        ...


class Gpu:
    """PyTorch's current GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.sm = architecture_of(self.device)
        self.target = target_of(torch.cuda.get_device_name(self.device))
        self.timer: Timer = CudaTimer(self.device)

    def entered(self) -> AbstractContextManager[object]:
        return nullcontext()

    def launch(self, launch: Launch) -> None:
        driver.run(launch)

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)

    def peak_bytes(self) -> int | None:
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


class HostTimer:
    """Measures by the host's clock."""

    def seconds(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class StandIn(Bench):
    """The machine for PTX as a device for whole requests, whose tensors PyTorch's own operations write as well.

    Therefore it does not notice reads of what was never written, and each launch knows only its own tensors.

    Args:
        folder: Where cubins and their PTX are kept.
    """

    def __init__(self, folder: Path) -> None:
        target = load_targets()[REHEARSED]
        super().__init__(target.sm, folder)
        self.device = torch.device("cpu")
        self.target: Target | None = target
        self.timer: Timer = HostTimer()
        self.compiled: set[Specialisation] = set()

    def launch(self, launch: Launch) -> None:
        if launch.specialisation not in self.compiled:
            compile_kernels([launch], self.folder, jobs=1, ptx=True)
            self.compiled.add(launch.specialisation)
        self.memory.regions.clear()
        self.memory.starts.clear()
        super().launch(launch)

    @contextmanager
    def allocating(self) -> Iterator[None]:
        yield

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in ("SETS", "WARM_UP"):
                stack.enter_context(mock.patch.object(timing, name, 1))
            stack.enter_context(mock.patch.object(cases, "architecture_of", return_value=self.sm))
            stack.enter_context(self.running())
            yield

    def synchronise(self) -> None:
        return

    def peak_bytes(self) -> int | None:
        return None


def open_device(rehearses: bool, folder: Path) -> Device:
    """The device of this process.

    Args:
        folder: Where a rehearsal keeps its cubins and their PTX.
    """
    return StandIn(folder) if rehearses else Gpu()
