"""The host's own time for a step of the denoiser: the request's code with graph runs that do nothing."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.memory.arena import Runnable, Unbounded
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings, latent_shape
from wanforge.runtime.schedule import GraphRun

SMALLEST = ClipShape(16, 16, 1)
"""A clip of one token; only the device's work grows with the clip, not the host's."""


class Stub(Backend):
    """A backend whose graph runs do nothing but count themselves."""

    name = "stub"

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.memory = Unbounded(self.device, self.dtype, lambda graph_run, name: torch.empty(0))
        self.runs = 0

    def files(self) -> list[str]:
        return []

    def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        return self.count

    def count(self) -> None:
        self.runs += 1


def step_seconds(bundle: Bundle, repeats: int = 200) -> list[float]:
    """The host's seconds for each of `repeats` steps: casting and cutting the latents, every graph run, and putting the
    velocity together."""
    pipeline = Pipeline(bundle, Stub())
    checked = pipeline.check(Request("a", SMALLEST, topk=1.0))
    denoiser = pipeline.denoiser(checked, Timings())
    latents = torch.zeros(latent_shape(pipeline.model, SMALLEST), dtype=torch.float64)
    runs = []
    for _ in range(repeats + 10):
        start = time.perf_counter()
        denoiser(latents, checked.steps[0])
        runs.append(time.perf_counter() - start)
    return runs[10:]  # the first ones also bind the graphs
