"""TensorRT: runs every graph as an engine, on the same schedule as the other backends.

Buffers and weights lie in one arena (`memory.plan`), and all engines share one workspace. A step whose weights all stay
in memory is captured into a CUDA graph when it runs for the second time. The table of text embeddings is read from the
mapped bundle, because a prompt needs only a few rows of its two gigabytes.

This has not run on a GPU. Which engines run, on which addresses and with which weights, and when these are copied, is
tested on a CPU with a stand-in for TensorRT and CUDA that runs the same graphs in ONNX Runtime.
"""

import atexit
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import HOST_GRAPHS
from wanforge.engines.bundle.shapes import names_in
from wanforge.engines.files import engines_of
from wanforge.engines.loader import LoadedEngine, Loader
from wanforge.errors import BundleError, ResourceError
from wanforge.plugins.tensorrt.library import Library, flavour_for, open_library
from wanforge.plugins.tensorrt.plugin import Account, registered
from wanforge.runtime.backends.base import Backend, Session
from wanforge.runtime.backends.host import on_host
from wanforge.runtime.graphs import graphs
from wanforge.runtime.memory.arena import Arena, Guarded, Memory, Runnable, Unbounded
from wanforge.runtime.memory.cuda import Cuda, StreamMover, cache_file
from wanforge.runtime.memory.plan import RESERVE, MemoryPlan, plan_request
from wanforge.runtime.memory.residency import GroupName, Residency
from wanforge.runtime.memory.weights import Weights
from wanforge.runtime.schedule import GraphRun, Schedule


class TrtBackend(Backend):
    """TensorRT-RTX, or TensorRT on GPUs that TensorRT-RTX does not support.

    Args:
        budget: The most bytes of the GPU's memory to use; by default the free memory, less a reserve.

    Raises:
        ResourceError: There is no GPU, or no library for it.
    """

    name = "trt"
    text_rows_multiple = 64
    """Text rows are filled up to a multiple of this, so that prompts of many lengths share a captured graph."""

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None, budget: float | None = None) -> None:
        self.cuda = Cuda()
        self.bundle, self.device, self.dtype = bundle, self.cuda.device, dtype or torch.bfloat16
        self.budget = budget
        self.weights = Weights(bundle)
        self.graphs = graphs(bundle.model, bundle.recipe)
        self.library = open_library(flavour_for(self.cuda.sm))
        self.loader = Loader(self.library, cache_file(str(self.library), self.cuda.name))
        self.memory: Memory = Unbounded(self.device, self.dtype, self.weights.of)
        self.engines: dict[str, LoadedEngine] = {}
        self._clip: ClipShape | None = None
        self._sessions: dict[str, Session] = {}
        self._packed: dict[GroupName, Tensor] = {}

    def files(self) -> list[str]:
        return self.weights.files()

    def prepare(self, clip: ClipShape) -> None:
        """Load the engines of a clip and lay out the GPU's memory for it."""
        if clip == self._clip:
            return
        self.plugins = register_plugins(self.library)
        self._sessions, self._clip = {}, None
        self.memory = Unbounded(self.device, self.dtype, self.weights.of)
        self.cuda.reclaim()
        wanted = engines_of(self.bundle, clip, self.cuda.sm, self.dtype)
        loaded = {engine.name: engine for engine in self.engines.values()}
        self.engines = {
            graph: loaded.get(name) or self.loader.load(self.bundle, name) for graph, name in wanted.items()
        }
        workspaces = {graph: engine.workspace_bytes for graph, engine in self.engines.items()}
        plan = plan_request(self.bundle, self.graphs, clip, workspaces, self.dtype.itemsize, self._arena_bytes())
        arena = Arena(plan, self.device, self.dtype, partial(self._mover, plan), self.weights.of)
        for engine in self.engines.values():
            engine.place(arena.bytes.data_ptr(), engine.workspace_bytes)
        self.memory, self._clip = arena, clip

    def _arena_bytes(self) -> float:
        """The bytes available for an arena once the engines are in the GPU's memory."""
        free = self.cuda.free_bytes() - RESERVE
        engines = sum(self.bundle.manifest.files[engine.name].bytes for engine in self.engines.values())
        return free if self.budget is None else min(free, self.budget - engines)

    def _mover(self, plan: MemoryPlan, slots: Sequence[Tensor]) -> StreamMover:
        return StreamMover(self.cuda, slots, self.weights.component, plan.returning(), self._packed)

    def session(self, schedule: Schedule) -> Session:
        """Start a stage. If its schedule is the same as last time, its session is reused, with the captured steps."""
        last = self._sessions.get(schedule.stage)
        if last is not None and last.schedule == schedule:
            last.enter()
            return last
        self._sessions[schedule.stage] = Session(self, schedule)
        return self._sessions[schedule.stage]

    def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        graph = self.graphs[graph_run.graph]
        if graph.name in HOST_GRAPHS:
            return on_host(graph, partial(self.weights.of, graph_run), inputs, outputs)
        engine = self.engines[graph.name]
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
        }

        def run() -> None:
            try:
                engine.enqueue(addresses, shapes, self.cuda.stream())
            except ResourceError as error:
                raise ResourceError("; ".join([str(error), *self.plugins.refusals])) from None

        return run

    def program(self, schedule: Schedule, name: str, runnables: Sequence[Runnable]) -> list[Runnable]:
        guarded = [each for each in runnables if isinstance(each, Guarded)]
        if name not in schedule.steps() or len(guarded) < len(runnables):
            return list(runnables)
        engines = {self.engines[graph_run.graph] for graph_run in schedule.programs[name]}
        return [
            CapturedStep(self.cuda, guarded, lambda: all(each.is_capturable(self.cuda.stream()) for each in engines))
        ]

    def synchronise(self) -> None:
        self.cuda.synchronise()


@cache
def register_plugins(library: Library) -> Account:
    """Register the plugins with a flavour of TensorRT for the lifetime of this process."""
    registration = registered(library)
    account = registration.__enter__()
    atexit.register(registration.__exit__, None, None, None)
    return account


class CapturedStep:
    """A step as a single call: its graphs run one by one at first, then they are captured, and then replayed. While
    weights are still being copied, they run one by one, because copying takes far longer than launching kernels.

    Args:
        is_capturable: Returns whether all engines of the step can be captured.
    """

    def __init__(self, cuda: Cuda, runnables: Sequence[Guarded], is_capturable: Callable[[], bool]) -> None:
        self.cuda, self.runnables, self.is_capturable = cuda, runnables, is_capturable
        self.residency: Residency = runnables[0].arena.residency
        self.turns = [each.turn for each in runnables]
        self.has_run = False
        self.replay: Runnable | None = None

    def __call__(self) -> None:
        if not self.has_run or not self.residency.are_settled(self.turns) or not self.is_capturable():
            for runnable in self.runnables:
                runnable()
            self.has_run = True
            return
        self.runnables[0].check()
        if self.replay is None:
            self.replay = self.cuda.record(self._run_bare)
        self.residency.run_settled(self.turns, self.replay)

    def _run_bare(self) -> None:
        for runnable in self.runnables:
            runnable.bound()
