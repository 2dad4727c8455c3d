"""The reference as a backend: every graph runs as the piece of the reference network that it was traced from."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import HOST_GRAPHS
from wanforge.plugins.low_rank import filled_rank
from wanforge.runtime.backends.arena_backend import ArenaBackend
from wanforge.runtime.backends.host import on_host
from wanforge.runtime.backends.taps import ATTENTION, Taps, tapped
from wanforge.runtime.graphs import Graph
from wanforge.runtime.memory.arena import Runnable
from wanforge.runtime.memory.cuda import gpu
from wanforge.runtime.memory.device import Device, Host
from wanforge.runtime.memory.estimate import needed_device_bytes
from wanforge.runtime.schedule import GraphRun

Runner = Callable[[Mapping[str, Tensor], Sequence[Tensor]], tuple[Tensor, ...]]


def gpu_or_host() -> Device:
    """The GPU if PyTorch sees one, otherwise the host."""
    return gpu() if torch.cuda.is_available() else Host()


class TorchBackend(ArenaBackend):
    """PyTorch in eager mode, by default on the CPU. Intermediate tensors come from PyTorch's own allocator."""

    name = "torch"
    rounds_at: Collection[str] = (ATTENTION,)

    def __init__(
        self, bundle: Bundle, dtype: torch.dtype | None, budget: float | None = None, on: Device | None = None
    ) -> None:
        on = on or Host()
        super().__init__(bundle, on, dtype or (torch.bfloat16 if on.has_memory else torch.float32), budget)

    def arena_bytes(self, clip: ClipShape) -> float:
        beside = needed_device_bytes(self.bundle.model, self.bundle.recipe, clip, self.dtype.itemsize)
        return super().arena_bytes(clip) - beside

    def side_rank(self, needed: int, clip: ClipShape | None = None) -> int:
        return 0 if self.bundle.recipe.linear == "bf16" else filled_rank(needed)

    def runner(self, graph: Graph) -> Runner:
        """The function that computes a graph from its weights and inputs."""
        return graph.run

    def bind_graph(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        graph = self.graphs[graph_run.graph]
        if graph.name in HOST_GRAPHS and self.on.has_memory:
            return on_host(graph, partial(self.weights.of, graph_run), inputs, outputs)
        compute, state = self.runner(graph), self.memory.weights(graph_run, graph.weights)

        def run() -> None:
            with torch.inference_mode():
                for buffer, result in zip(outputs, compute(state, inputs), strict=True):
                    buffer.copy_(result)

        return run

    def taps(self, graph_run: GraphRun, inputs: Sequence[Tensor], forced: Mapping[str, Tensor] | None = None) -> Taps:
        graph = self.graphs[graph_run.graph]
        with torch.inference_mode(), tapped(graph.owner, forced or {}) as found:
            (found[graph.outputs[0].name],) = graph.run(self.own_state(graph_run), inputs)
        return found

    def own_state(self, graph_run: GraphRun) -> dict[str, Tensor]:
        """The weights of a graph run, named as in its graph, in memory that no other graph run shares."""
        return {name: self.own_weight(graph_run, name) for name in self.graphs[graph_run.graph].weights}
