"""The reference as a backend: every graph is the piece of the reference network that it was traced from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wanforge.engines.bundle import Bundle
from wanforge.runtime.backends.base import Bound
from wanforge.runtime.graphs import graphs
from wanforge.runtime.schedule import Launch
from wanforge.runtime.weights import Weights


class TorchBackend:
    """PyTorch, eager, on the CPU."""

    name = "torch"

    def __init__(self, bundle: Bundle, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device("cpu"), dtype
        self.weights = Weights(bundle)
        self.graphs = graphs(bundle.model, bundle.recipe)

    def files(self) -> list[str]:
        return self.weights.files()

    def bind(self, launch: Launch, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Bound:
        graph, stored = self.graphs[launch.graph], self.weights.component(launch.component)
        state = {name: stored[launch.prefix + name] for name in graph.weights}

        def run() -> None:
            with torch.inference_mode():
                for buffer, result in zip(outputs, graph.run(state, inputs), strict=True):
                    buffer.copy_(result)

        return run
