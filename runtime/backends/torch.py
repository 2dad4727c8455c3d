"""The reference as a backend: every graph is the piece of the reference network that it was traced from."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from wanforge.engines.bundle import Bundle
from wanforge.runtime.arena import Bound, Unbounded
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.backends.points import ATTENTION, Points, tapped
from wanforge.runtime.graphs import Graph, graphs
from wanforge.runtime.schedule import Launch
from wanforge.runtime.weights import Weights

Runner = Callable[[Mapping[str, Tensor], Sequence[Tensor]], tuple[Tensor, ...]]


class TorchBackend(Backend):
    """PyTorch, eager, on the CPU."""

    name = "torch"
    rounds_at: Collection[str] = (ATTENTION,)

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = torch.device("cpu"), dtype or torch.float32
        self.weights = Weights(bundle)
        self.graphs = graphs(bundle.model, bundle.recipe)
        self.memory = Unbounded(self.device, self.dtype, self.weight)

    def files(self) -> list[str]:
        return self.weights.files()

    def weight(self, launch: Launch, name: str) -> Tensor:
        """One of a launch's weights, where it is computed with."""
        return self.weights.of(launch, name)

    def state(self, launch: Launch) -> dict[str, Tensor]:
        """The weights of a launch, named as in its graph."""
        return self.memory.weights(launch, self.graphs[launch.graph].weights)

    def runner(self, graph: Graph) -> Runner:
        """What computes a graph from its weights and inputs."""
        return graph.run

    def bind(self, launch: Launch, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Bound:
        compute, state = self.runner(self.graphs[launch.graph]), self.state(launch)

        def run() -> None:
            with torch.inference_mode():
                for buffer, result in zip(outputs, compute(state, inputs), strict=True):
                    buffer.copy_(result)

        return run

    def points(self, launch: Launch, inputs: Sequence[Tensor], forced: Mapping[str, Tensor] | None = None) -> Points:
        graph = self.graphs[launch.graph]
        with torch.inference_mode(), tapped(graph.owner, forced or {}) as found:
            (found[graph.outputs[0].name],) = graph.run(self.state(launch), inputs)
        return found
