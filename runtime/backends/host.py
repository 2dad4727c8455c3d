"""Graphs that run on the host although the backend computes on a GPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wanforge.runtime.graphs import Graph
from wanforge.runtime.memory.arena import Runnable


def on_host(
    graph: Graph, weight: Callable[[str], Tensor], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> Runnable:
    """Return a function that runs a graph in PyTorch on the host, from and to buffers on any device.

    Args:
        weight: Returns a weight on the host by its name in the graph.
    """
    state = {name: weight(name) for name in graph.weights}

    def run() -> None:
        with torch.inference_mode():
            results = graph.run(state, [each.cpu() for each in inputs])
        for buffer, result in zip(outputs, results, strict=True):
            buffer.copy_(result)

    return run
