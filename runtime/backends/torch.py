"""The reference as a backend: every graph runs as the piece of the reference network that it was traced from."""

from collections.abc import Callable, Collection, Mapping, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.backends.taps import ATTENTION, Taps, tapped
from wanforge.runtime.graphs import Graph, graphs
from wanforge.runtime.memory.arena import Runnable, Unbounded
from wanforge.runtime.memory.weights import Weights
from wanforge.runtime.schedule import GraphRun

Runner = Callable[[Mapping[str, Tensor], Sequence[Tensor]], tuple[Tensor, ...]]


CPU = torch.device("cpu")


def gpu_or_cpu() -> torch.device:
    """A GPU if PyTorch sees one, otherwise the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


class TorchBackend(Backend):
    """PyTorch in eager mode, by default on the CPU."""

    name = "torch"
    rounds_at: Collection[str] = (ATTENTION,)

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None, device: torch.device = CPU) -> None:
        self.device = device
        self.dtype = dtype or (torch.float32 if device == CPU else torch.bfloat16)
        self.weights = Weights(bundle)
        self.graphs = graphs(bundle.model, bundle.recipe)
        self.memory = Unbounded(self.device, self.dtype, self.weight)
        # Every step binds its layers again, so they share the weights, which leave the GPU with the stage's session.
        self._resident: WeakValueDictionary[tuple[str, str], Tensor] = WeakValueDictionary()

    def files(self) -> list[str]:
        return self.weights.files()

    def weight(self, graph_run: GraphRun, name: str) -> Tensor:
        """A weight of a graph run, on the device that computes with it."""
        stored = self.weights.of(graph_run, name)
        if self.device == CPU:
            return stored
        place = graph_run.component, graph_run.prefix + name
        resident = self._resident.get(place)
        if resident is None:
            resident = self._resident[place] = stored.to(self.device)
        return resident

    def state(self, graph_run: GraphRun) -> dict[str, Tensor]:
        """The weights of a graph run, named as in its graph."""
        return self.memory.weights(graph_run, self.graphs[graph_run.graph].weights)

    def runner(self, graph: Graph) -> Runner:
        """The function that computes a graph from its weights and inputs."""
        return graph.run

    def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        compute, state = self.runner(self.graphs[graph_run.graph]), self.state(graph_run)

        def run() -> None:
            with torch.inference_mode():
                for buffer, result in zip(outputs, compute(state, inputs), strict=True):
                    buffer.copy_(result)

        return run

    def synchronise(self) -> None:
        if self.device != CPU:
            torch.cuda.synchronize(self.device)

    def taps(self, graph_run: GraphRun, inputs: Sequence[Tensor], forced: Mapping[str, Tensor] | None = None) -> Taps:
        graph = self.graphs[graph_run.graph]
        with torch.inference_mode(), tapped(graph.owner, forced or {}) as found:
            (found[graph.outputs[0].name],) = graph.run(self.state(graph_run), inputs)
        return found
