"""Stand-ins for TensorRT and CUDA on a CPU: engines that run the graph they were "built" from in ONNX Runtime, at the
addresses they are given, and a copy stream that is as early or as late as its events allow."""

import ctypes
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, IntFlag
from functools import partial
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.engines.build import EngineOptions, graphs_to_build, pending_engine
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.shapes import Size, concrete
from wanforge.engines.files import write_engine
from wanforge.plugins.tensorrt.library import RTX, Library
from wanforge.runtime.backends.ort import new_session
from wanforge.runtime.graphs import Graph, graphs, side_graphs
from wanforge.runtime.memory.device import Host

ELEMENTS = {"tensor(float)": 1, "tensor(int8)": 3, "tensor(int32)": 6, "tensor(int64)": 7, "tensor(bfloat16)": 16}
VERSION = "1.7.1.116"
HEADER = b"engine for sm_89".ljust(64)
WORKSPACE = 100_000
Shape = tuple[int, ...]


class EngineValidity(Enum):
    INVALID, SUBOPTIMAL, VALID = range(3)


class EngineInvalidityDiagnostics(IntFlag):
    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER = 1, 2, 4


class Strategy(Enum):
    STATIC, USER_MANAGED = range(2)


class CudaGraphStrategy(Enum):
    DISABLED = 0


class Specialisation(Enum):
    LAZY, EAGER = range(2)


@dataclass
class Config:
    """The settings that contexts are made with; the cache keeps the bytes it was given."""

    strategy: Strategy = Strategy.STATIC
    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Specialisation = Specialisation.LAZY
    cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return Cache()

    def set_runtime_cache(self, cache: Any) -> None:
        self.cache = cache


@dataclass
class Cache:
    known: bytes = b""

    def deserialize(self, known: bytes) -> bool:
        self.known = known
        return True

    def serialize(self) -> bytes:
        return self.known + b"compiled;"


class Engine:
    """A graph in ONNX Runtime."""

    device_memory_size_v2 = WORKSPACE

    def __init__(self, stand_in: "StandIn", path: Path, graph: Graph) -> None:
        self.stand_in, self.graph = stand_in, graph
        self.session = new_session(str(path))
        self.names = [port.name for port in (*self.session.get_inputs(), *self.session.get_outputs())]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_runtime_config(self) -> Config:
        return Config()

    def create_execution_context(self, config: Config) -> "Context":
        assert config.strategy is Strategy.USER_MANAGED
        assert config.dynamic_shapes_kernel_specialization_strategy is Specialisation.EAGER
        return Context(self)


class Context:
    """Runs a graph on the addresses and shapes that were set last; a captured run keeps those set at its capture."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}
        self.memory: Any = None

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        assert size >= self.engine.device_memory_size_v2
        self.memory = (ctypes.c_uint8 * size).from_address(address)

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self.shapes[name] = shape
        return shape != self.engine.stand_in.refused

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.names
        assert address % 256 == 0, f"{name} lies at {address:#x}"
        self.addresses[name] = address
        return name != self.engine.stand_in.refused_tensor

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.stand_in.is_capturable

    def execute_async_v3(self, stream: int) -> bool:
        run = partial(self._run, dict(self.addresses), dict(self.shapes))
        self.engine.stand_in.launched.append(self.engine.graph.name)
        if self.engine.stand_in.capturing is not None:
            self.engine.stand_in.capturing.append(run)
        else:
            run()
        return True

    def _run(self, addresses: dict[str, int], shapes: dict[str, Shape]) -> None:
        ctypes.memset(self.memory, 0xA5, len(self.memory))  # anything that is kept there is lost
        session, graph, sizes = self.engine.session, self.engine.graph, dict[str, int]()
        for port in graph.inputs:
            for dim, number in zip(port.shape, shapes.get(port.name, ()), strict=False):
                if isinstance(dim, Size) and len(dim.names) == 1:
                    sizes[dim.names[0]] = number // dim.factor
        known = {port.name: list(concrete(port.shape, sizes)) for port in (*graph.inputs, *graph.outputs)}
        known |= {name: list(shapes[name]) for name in graph.factors}
        binding = session.io_binding()
        for bind, ports in ((binding.bind_input, session.get_inputs()), (binding.bind_output, session.get_outputs())):
            for port in ports:
                shape = known.get(port.name, port.shape)
                bind(port.name, "cpu", 0, ELEMENTS[port.type], shape, addresses[port.name])
        session.run_with_iobinding(binding)


class Runtime:
    engine_header_size = len(HEADER)

    def __init__(self, stand_in: "StandIn") -> None:
        self.stand_in = stand_in

    def get_engine_validity(self, header: bytes) -> tuple[EngineValidity, EngineInvalidityDiagnostics]:
        kinds = EngineInvalidityDiagnostics
        if header == HEADER:
            return EngineValidity.VALID, kinds(0)
        if header.startswith(b"new"):
            return EngineValidity.INVALID, kinds.OLD_CUDA_DRIVER
        return EngineValidity.INVALID, kinds.VERSION_MISMATCH | kinds.UNSUPPORTED_CC

    def deserialize_cuda_engine(self, plan: bytes) -> Engine:
        told = json.loads(plan[len(HEADER) :])
        return Engine(self.stand_in, Path(told["onnx"]), self.stand_in.graphs[told["graph"]])


class Event:
    """An event of the copy stream; `finish` does all the copies queued before it."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self.finish = finish


class Gpu(Host):
    """A stand-in for a GPU: the host, whose copies are as early or as late as their events allow.

    Attributes:
        is_late: Whether copies happen only when their event is waited for, instead of at once.
        replays: Number of times that something recorded was repeated.
        is_recording: Whether something is being recorded, when nothing may be copied or waited for.
    """

    has_memory = True
    sm = 89
    name = "GPU-1.0"
    is_recording = False

    def __init__(self, is_late: bool, free: int = 1 << 34) -> None:
        super().__init__()
        self.is_late, self.free = is_late, free
        self.replays = self.pinned_bytes = 0
        self.queue: list[Callable[[], None]] = []
        self.lock = Lock()

    def free_bytes(self) -> int:
        return self.free

    def stream(self) -> int:
        return 7

    def pinned(self, size: int) -> Tensor:
        self.pinned_bytes += size
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event | None) -> Event:
        assert not self.is_recording

        @torch.inference_mode()
        def copy() -> None:
            for target, source in pairs:
                target.copy_(source)

        with self.lock:
            self.queue.append(copy)
        event = Event(partial(self._finish, len(self.queue), list(self.queue)))
        if not self.is_late:
            event.finish()
        return event

    def _finish(self, count: int, queued: list[Callable[[], None]]) -> None:
        """Do everything that was queued up to an event, because the stream keeps its order."""
        with self.lock:
            for each in queued[:count]:
                if each in self.queue:
                    self.queue.remove(each)
                    each()

    def mark(self) -> Event:
        assert not self.is_recording
        return Event(lambda: None)

    def wait(self, event: Event) -> None:
        assert not self.is_recording
        event.finish()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        def repeat() -> None:
            self.is_recording = True
            work()
            self.is_recording = False
            self.replays += 1

        return repeat


class StandIn(Gpu):
    """TensorRT and a GPU in one object.

    Attributes:
        refused: A shape that engines refuse.
        refused_tensor: The name of a tensor whose address engines refuse.
        is_capturable: Whether engines can be captured.
        launched: Names of the graphs that were put on a stream.
        capturing: What engines have put on the stream that is being captured.
    """

    def __init__(self, bundle: Bundle, is_late: bool) -> None:
        super().__init__(is_late)
        self.bundle, self.graphs = bundle, dict(graphs(bundle.model, bundle.recipe))
        self.graphs |= {graph.name: graph for graph in side_graphs(bundle.model, bundle.recipe)}
        self.refused: Shape = ()
        self.refused_tensor = ""
        self.is_capturable = True
        self.launched: list[str] = []
        self.capturing: list[Callable[[], None]] | None = None

    @property
    def library(self) -> Library:
        trt = SimpleNamespace(
            Runtime=lambda log: Runtime(self),
            Logger=SimpleNamespace,
            EngineValidity=EngineValidity,
            EngineInvalidityDiagnostics=EngineInvalidityDiagnostics,
            ExecutionContextAllocationStrategy=Strategy,
            CudaGraphStrategy=CudaGraphStrategy,
            DynamicShapesKernelSpecializationStrategy=Specialisation,
        )
        trt.Logger = type("Logger", (), {"WARNING": 0, "__init__": lambda self, level: None})
        return Library(RTX, trt, VERSION)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.is_recording, self.capturing = True, []
        work()
        captured, self.is_recording, self.capturing = self.capturing, False, None

        def repeat() -> None:
            self.replays += 1
            for each in captured:
                each()

        return repeat

    def capturable(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does some work at once, or when what is captured is repeated, as kernels do."""

        def run() -> None:
            if self.capturing is None:
                work()
            else:
                self.capturing.append(work)

        return run


def write_engines(bundle: Bundle, clip: ClipShape, stand_in: StandIn, side_rank: int | None = None) -> None:
    """Write an engine of every graph, "built" from an ONNX file that ONNX Runtime can run."""
    facts = {"layers": 1, "plugins": 0, "activation_bytes": WORKSPACE}
    options = EngineOptions(clip, (89,), side_rank=side_rank)
    for onnx, graph in graphs_to_build(bundle, (), side_rank).items():
        pending = pending_engine(bundle, stand_in.library, options, onnx, graph)
        engine = HEADER + json.dumps({"onnx": str(pending.job.onnx), "graph": graph.name}).encode()
        write_engine(bundle, pending.name, engine, pending.key, facts)
