"""The host's own time for a step of the denoiser on the backend `cuda`, with a GPU and a driver that do nothing.

The code is the one that serves requests on a GPU, on tensors of one token in the host's memory: casting and cutting the
latents, binding every graph run, waiting for weights, adding up addresses, handing each launch over, and putting the
velocity together. The stem and the head are left out. So are the driver's time for a launch or a CUDA graph and
PyTorch's for a GPU's memory and streams, which only a GPU can show.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.plugins.launching.driver import Driver, Launcher, LoadedKernel
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.tensor_map.parameters import expanded
from wanforge.runtime.backends.cuda import CudaBackend
from wanforge.runtime.backends.planned import Planned
from wanforge.runtime.memory.arena import Runnable
from wanforge.runtime.memory.device import Event, Host, Work
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings, latent_shape
from wanforge.runtime.schedule import GraphRun

BUDGET = 16e9
"""Bytes of the device, which are never written to. The denoiser stays there, and nothing else has to."""
SMALLEST = ClipShape(16, 16, 1)
"""A clip of one token; only the device's work grows with the clip, not the host's."""


class IdleCuda:
    """What the launcher calls of ``cuda.bindings.driver``, with launches that are only counted."""

    class CUresult:
        CUDA_SUCCESS = 0

    def __init__(self) -> None:
        self.launches = 0

    def cuDevicePrimaryCtxRetain(self, device: int | None) -> tuple[int, int]:
        return 0, 0

    def cuCtxPushCurrent(self, context: int) -> tuple[int]:
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, int]:
        return 0, 0

    def cuLaunchKernel(self, *arguments: Any) -> tuple[int]:
        self.launches += 1
        return (0,)


class IdleGpu(Host):
    """A GPU with any amount of memory, to which nothing is copied and on which nothing runs."""

    has_memory = True

    def free_bytes(self) -> int:
        return sys.maxsize

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event) -> Event:
        return None

    def record(self, work: Work) -> Work:
        return lambda: None


class IdleDriver(Driver):
    """A driver for tensors in the host's memory."""

    def stream(self, device: torch.device) -> int:
        return 0


class IdleLauncher(Launcher):
    """A launcher that needs no cubins."""

    def load(self, device: torch.device, launch: Launch) -> LoadedKernel:
        return LoadedKernel(None, tuple(expanded(launch.specialisation.types)), 32 * launch.num_warps, 0)


class HostOnly(CudaBackend):
    """The backend `cuda` without a GPU's work. Graph runs other than blocks do nothing."""

    name = "host"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, torch.bfloat16, BUDGET, IdleGpu())
        self.cuda = IdleCuda()
        self.planned = Planned(self.run_block, IdleLauncher(IdleDriver(self.cuda)))

    def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        return super().bind(graph_run, inputs, outputs) if graph_run.graph == "block" else lambda: None

    def forget(self) -> None:
        """Forget the sessions and what they have recorded, but not the launch plans."""
        self._sessions = {}


@dataclass(frozen=True)
class HostTime:
    """The host's time for steps, which is the processor time that the launching thread takes. It waits for nothing
    meanwhile, so on a quiet machine this is how long it takes.

    Attributes:
        launches: The number of launches of a step.
        seconds: Of each step that binds its graph runs and launches every kernel.
        recorded: Of each step that repeats what was recorded.
    """

    launches: int
    seconds: list[float]
    recorded: list[float]


def host_time(bundle: Bundle, requests: int = 25) -> HostTime:
    """Time every step of some requests that launch, with the plans of a request that came before, and of as many that
    repeat what the last of them recorded."""
    backend = HostOnly(bundle)
    pipeline = Pipeline(bundle, backend)
    checked = pipeline.check(Request("a", SMALLEST, topk=1.0))
    latents = torch.zeros(latent_shape(pipeline.model, SMALLEST), dtype=torch.float64)

    def request() -> list[float]:
        denoiser, seconds = pipeline.denoiser(checked, Timings()), []
        for step in checked.steps:
            start = time.thread_time()
            denoiser(latents, step)
            seconds.append(time.thread_time() - start)
        return seconds

    with one_thread():
        request()
        launches = backend.cuda.launches // len(checked.steps)
        launched = []
        for _ in range(requests):
            backend.forget()
            launched += request()
        request()
        recorded = [seconds for _ in range(requests) for seconds in request()]
    return HostTime(launches, launched, recorded)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute on this thread alone. Others would be waited for, which a GPU's host never does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
