"""The reference with its denoiser's blocks compiled by PyTorch: a baseline to be faster than, not a way to serve."""

import shutil
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends.torch import Runner, TorchBackend, gpu_or_cpu
from wanforge.runtime.graphs import Graph


def missing() -> str | None:
    """Why there is no such baseline here. PyTorch compiles with Triton for a GPU, with a C++ compiler for the CPU."""
    has_compiler = torch.cuda.is_available() or any(map(shutil.which, ("g++", "clang++")))
    return None if has_compiler else "no C++ compiler is here"


class CompiledBackend(TorchBackend):
    """Everything as the reference, but for the graph ``block``; on a GPU in bfloat16, without one in float32."""

    name = "compile"

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None) -> None:
        super().__init__(bundle, dtype, gpu_or_cpu())
        block = self.graphs["block"]

        def run(weights: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return block.run(weights, inputs)

        self.block: Runner = torch.compile(run, dynamic=False)

    def runner(self, graph: Graph) -> Runner:
        return self.block if graph.name == "block" else super().runner(graph)
