"""TensorRT: runs every graph as an engine, on the same schedule as the other backends.

Buffers and weights lie in one arena (`memory.plan`), and all engines share one workspace. The table of text embeddings
is read from the mapped bundle, because a prompt needs only a few rows of its two gigabytes.

This has not run on a GPU. Which engines run, on which addresses and with which weights, and when these are copied, is
tested on a CPU with a stand-in for TensorRT and CUDA that runs the same graphs in ONNX Runtime.
"""

import atexit
from collections.abc import Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import HOST_GRAPHS
from wanforge.engines.bundle.shapes import names_in
from wanforge.engines.files import engines_of, side_ranks
from wanforge.engines.loader import LoadedEngine, Loader
from wanforge.errors import BundleError, ResourceError
from wanforge.plugins.tensorrt.library import Library, flavour_for, open_library
from wanforge.plugins.tensorrt.plugin import Account, registered
from wanforge.runtime.backends.arena_backend import ArenaBackend
from wanforge.runtime.backends.host import on_host
from wanforge.runtime.causal.kept import RECALL
from wanforge.runtime.memory.arena import Runnable
from wanforge.runtime.memory.cuda import cache_file, gpu
from wanforge.runtime.schedule import GraphRun


class TrtBackend(ArenaBackend):
    """TensorRT-RTX, or TensorRT on GPUs that TensorRT-RTX does not support.

    Args:
        budget: The most bytes of the GPU's memory to use; by default the free memory, less a reserve.

    Raises:
        ResourceError: There is no GPU, or no library for it.
    """

    name = "trt"

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None, budget: float | None = None) -> None:
        self.gpu = gpu()
        super().__init__(bundle, self.gpu, dtype or torch.bfloat16, budget)
        self.library = open_library(flavour_for(self.gpu.sm))
        self.loader = Loader(self.library, cache_file(str(self.library), self.gpu.name))
        self.engines: dict[str, LoadedEngine] = {}

    def load(self, clip: ClipShape) -> None:
        self.plugins = register_plugins(self.library)
        side_rank = self.weights.side_rank
        wanted = engines_of(self.bundle, clip, self.gpu.sm, self.dtype, side_rank=side_rank)
        loaded = {engine.name: engine for engine in self.engines.values()}
        self.engines = {
            graph: loaded.get(name) or self.loader.load(self.bundle, name) for graph, name in wanted.items()
        }

    def side_rank(self, needed: int, clip: ClipShape | None = None) -> int:
        ranks = [rank for rank in side_ranks(self.bundle, self.gpu.sm) if rank >= needed]
        return next((rank for rank in ranks if clip is None or self._has_engines(clip, rank)), 0)

    def _has_engines(self, clip: ClipShape, side_rank: int) -> bool:
        """Whether all engines that a clip needs with a side path are there and current."""
        try:
            return bool(engines_of(self.bundle, clip, self.gpu.sm, self.dtype, side_rank=side_rank))
        except BundleError:
            return False

    def arena_bytes(self, clip: ClipShape) -> float:
        free = super().arena_bytes(clip)
        engines = sum(self.bundle.manifest.files[engine.name].bytes for engine in self.engines.values())
        return free if self.budget is None else min(free, self.budget - engines)

    def workspaces(self) -> Mapping[str, int]:
        return {graph: engine.workspace_bytes for graph, engine in self.engines.items()}

    def place(self, workspace: Tensor) -> None:
        for engine in self.engines.values():
            engine.place(workspace.data_ptr(), engine.workspace_bytes)

    def can_record(self, graph_run: GraphRun) -> bool:
        return graph_run.graph == RECALL or self.engines[graph_run.graph].is_capturable(self.gpu.stream())

    def bind_graph(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        graph = self.graphs[graph_run.graph]
        if graph.name in HOST_GRAPHS:
            return on_host(graph, partial(self.weights.of, graph_run), inputs, outputs)
        engine = self.engines[graph_run.graph]
        ports = [*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)]
        tensors = {port.name: buffer for port, buffer in ports}
        if not graph.has_constants:
            tensors |= self.memory.weights(graph_run, graph.weights)
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        if missing := engine.tensors - addresses.keys():
            raise BundleError(
                f"{engine.name} expects {', '.join(sorted(missing))}, which the graph {graph.name} does not have; "
                "build the engines again"
            )
        shapes = {
            port.name: tuple(buffer.shape)
            for port, buffer in zip(graph.inputs, inputs, strict=True)
            if names_in([port.shape])
        } | {name: tuple(tensors[name].shape) for name in graph.factors}

        def run() -> None:
            try:
                engine.enqueue(addresses, shapes, self.gpu.stream())
            except ResourceError as error:
                raise ResourceError("; ".join([str(error), *self.plugins.refusals])) from None

        return run


@cache
def register_plugins(library: Library) -> Account:
    """Register the plugins with a flavour of TensorRT for the lifetime of this process."""
    registration = registered(library)
    account = registration.__enter__()
    atexit.register(registration.__exit__, None, None, None)
    return account
