"""The reference with its denoiser's blocks compiled by PyTorch: a baseline to beat, not a way to serve requests."""

import shutil
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends.torch import Runner, TorchBackend, gpu_or_host
from wanforge.runtime.graphs import Graph


def missing() -> str | None:
    """Why this baseline cannot run here, or None. PyTorch needs Triton for a GPU and a C++ compiler for the CPU."""
    has_compiler = torch.cuda.is_available() or any(map(shutil.which, ("g++", "clang++")))
    return None if has_compiler else "no C++ compiler was found"


class CompiledBackend(TorchBackend):
    """The reference with the graph ``block`` compiled, in bfloat16 on a GPU and in float32 without one."""

    name = "compile"

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None) -> None:
        super().__init__(bundle, dtype, on=gpu_or_host())
        block = self.graphs["block"]

        def run(weights: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return block.run(weights, inputs)

        self.block: Runner = torch.compile(run, dynamic=False)

    def runner(self, graph: Graph) -> Runner:
        return self.block if graph.name == "block" else super().runner(graph)
