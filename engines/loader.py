"""Loading engines into a GPU's memory with either flavour of TensorRT: the checks before reading them, and the cache of
what TensorRT-RTX compiles on the machine itself.

This has not run on a GPU: the calls are those of the libraries' Python interface, tested with a stand-in for it.
"""

import atexit
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.remedies import remedy
from wanforge.engines.files import read_engine
from wanforge.errors import BundleError, ResourceError
from wanforge.plugins.tensorrt.library import RTX, Library
from wanforge.whole_file import write_atomically

Shape = tuple[int, ...]

OF_THE_ENGINE = {"VERSION_MISMATCH", "UNSUPPORTED_CC", "MALFORMED_ENGINE"}
"""TensorRT-RTX's complaints about an engine that building it again cures; the others are about the machine."""


@dataclass(frozen=True)
class LoadedEngine:
    """An engine, ready to be put on a stream.

    Attributes:
        tensors: Names of its inputs and outputs, without those that the graph does not use.
        workspace_bytes: Bytes of its intermediate tensors, which lie where `place` puts them.
    """

    name: str
    context: Any
    tensors: frozenset[str]
    workspace_bytes: int

    def place(self, address: int, size: int) -> None:
        """Give it memory for its intermediate tensors, which engines that take turns can share."""
        self.context.set_device_memory(address, size)

    def is_capturable(self, stream: int) -> bool:
        """Whether a run with the shapes of the last one can be captured into a CUDA graph. TensorRT has no such query,
        because there every run can."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream))

    def enqueue(self, addresses: Mapping[str, int], shapes: Mapping[str, Shape], stream: int) -> None:
        """Put one run on a stream.

        Args:
            addresses: Addresses of every input and output.
            shapes: Shapes of the inputs whose shape varies.

        Raises:
            ResourceError: The library refuses.
        """
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, shape):
                raise ResourceError(f"{self.name} was not built for {name} of shape {shape}; build it for this clip")
        for name in self.tensors:
            if not self.context.set_tensor_address(name, addresses[name]):
                raise ResourceError(
                    f"{self.name}: the library does not take {addresses[name]:#x} as the address of {name}; its own "
                    "message is above"
                )
        if not self.context.execute_async_v3(stream):
            raise ResourceError(f"{self.name}: the library did not run it; its own message is above")


class Loader:
    """Loads engines of one flavour.

    Args:
        cache: File of what TensorRT-RTX has compiled for this GPU and driver; it is saved again at exit.
    """

    def __init__(self, library: Library, cache: Path | None = None) -> None:
        trt = library.trt
        self.library, self.cache_file = library, cache
        self._cache: Any = None
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        if cache is not None:
            atexit.register(self.save_cache)

    def load(self, bundle: Bundle, name: str) -> LoadedEngine:
        """Load an engine of a bundle, after checking that its header fits this machine.

        Raises:
            BundleError: It is stale, damaged, or for another version or GPU.
            ResourceError: This GPU or its driver will not do.
        """
        path = bundle.path(name)
        self._check_header(path, f"{path}", remedy(name, bundle.root))
        engine = self.runtime.deserialize_cuda_engine(read_engine(bundle, name))
        if engine is None:
            raise BundleError(f"{path}: {self.library} does not load it; {remedy(name, bundle.root)}")
        tensors = frozenset(engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
        return LoadedEngine(name, self._context(engine), tensors, engine.device_memory_size_v2)

    def _check_header(self, path: Path, what: str, cure: str) -> None:
        """Ask TensorRT-RTX, which can tell from an engine's first bytes; TensorRT can tell only when it loads it."""
        if self.library.flavour is not RTX:
            return
        trt = self.library.trt
        with path.open("rb") as file:
            header = file.read(self.runtime.engine_header_size)
        validity, reasons = self.runtime.get_engine_validity(header)
        if validity == trt.EngineValidity.INVALID:
            kinds = trt.EngineInvalidityDiagnostics
            said = {name for name in dir(kinds) if name.isupper() and int(getattr(kinds, name)) & int(reasons)}
            listed = ", ".join(sorted(said)) or "no reason given"
            if said and said <= OF_THE_ENGINE:
                raise BundleError(f"{what}: not for this machine ({listed}); {cure}")
            raise ResourceError(f"{what}: this GPU or its driver will not do ({listed}); run: wanforge doctor")

    def _context(self, engine: Any) -> Any:
        """An execution context without memory of its own."""
        trt = self.library.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.library.flavour is not RTX:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # Otherwise the fallback that runs until the right kernel is compiled would be captured for good.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # whole steps are captured, not single engines
        if self._cache is None and self.cache_file is not None:
            self._cache = config.create_runtime_cache()
            if self.cache_file.is_file():
                self._cache.deserialize(self.cache_file.read_bytes())  # it refuses another GPU's or driver's
        if self._cache is not None:
            config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def save_cache(self) -> None:
        """Keep what has been compiled on this machine for the next start."""
        if self._cache is not None and self.cache_file is not None:
            write_atomically(self.cache_file, bytes(self._cache.serialize()))
