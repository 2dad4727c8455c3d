"""The host's own time for a step of the denoiser on the backend `kernels`, with a driver that launches nothing.

The code is the one that serves requests on a GPU, on tensors of one token in the host's memory: casting and cutting the
latents, binding every graph run, adding up addresses, handing each launch over, and putting the velocity together.
PyTorch's attention to the text is computed for the one token. The stem and the head are left out. So are the driver's
time for a launch and PyTorch's for a GPU's memory and streams, which only a GPU can show.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.plugins.launching.driver import Driver, Launcher, LoadedKernel
from wanforge.plugins.launching.launch import Launch
from wanforge.runtime.backends.kernels import KernelsBackend
from wanforge.runtime.backends.planned import Planned
from wanforge.runtime.memory.arena import Runnable
from wanforge.runtime.memory.device import Host
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings, latent_shape
from wanforge.runtime.schedule import GraphRun

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


class IdleDriver(Driver):
    """A driver for tensors in the host's memory."""

    def stream(self, device: torch.device) -> int:
        return 0


class IdleLauncher(Launcher):
    """A launcher that needs no cubins."""

    def load(self, device: torch.device, launch: Launch) -> LoadedKernel:
        return LoadedKernel(None, launch.specialisation.types, 32 * launch.num_warps, 0)


class HostOnly(KernelsBackend):
    """The backend `kernels` without a GPU's work. Graph runs other than blocks do nothing."""

    name = "host"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, torch.bfloat16, on=Host())
        self.cuda = IdleCuda()
        self.planned = Planned(self.run_block, IdleLauncher(IdleDriver(self.cuda)))

    def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        return super().bind(graph_run, inputs, outputs) if graph_run.graph == "block" else lambda: None


@dataclass(frozen=True)
class HostTime:
    """The host's time for steps.

    Attributes:
        launches: The number of launches of a step.
        seconds: The processor time that the launching thread takes for each step. It waits for nothing meanwhile, so
            on a quiet machine this is how long it takes.
    """

    launches: int
    seconds: list[float]


def host_time(bundle: Bundle, requests: int = 25) -> HostTime:
    """Time every step of some requests. Each step binds its graph runs, as always; the launch plans are those of a
    request that came before."""
    backend = HostOnly(bundle)
    pipeline = Pipeline(bundle, backend)
    checked = pipeline.check(Request("a", SMALLEST, topk=1.0))
    latents = torch.zeros(latent_shape(pipeline.model, SMALLEST), dtype=torch.float64)
    seconds = []
    for _ in range(requests + 1):
        denoiser = pipeline.denoiser(checked, Timings())
        for step in checked.steps:
            start = time.thread_time()
            denoiser(latents, step)
            seconds.append(time.thread_time() - start)
    return HostTime(backend.cuda.launches // len(seconds), seconds[len(checked.steps) :])
