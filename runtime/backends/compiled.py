"""The reference with its denoiser's blocks compiled by PyTorch: a baseline to be faster than, not a way to serve."""

import shutil
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wanforge.engines.bundle import Bundle
from wanforge.runtime.backends.torch import Runner, TorchBackend
from wanforge.runtime.graphs import Graph


def has_compiler() -> bool:
    """Whether PyTorch finds what it compiles with: Triton for a GPU, a C++ compiler for the CPU."""
    return torch.cuda.is_available() or any(map(shutil.which, ("g++", "clang++")))


class CompiledBackend(TorchBackend):
    """Everything as the reference, but for the graph ``block``."""

    name = "compile"

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None) -> None:
        super().__init__(bundle, dtype)
        block = self.graphs["block"]

        def run(weights: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return block.run(weights, inputs)

        self.block: Runner = torch.compile(run, dynamic=False)

    def runner(self, graph: Graph) -> Runner:
        return self.block if graph.name == "block" else super().runner(graph)
