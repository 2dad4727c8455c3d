"""A GPU as a `Device`, through PyTorch: two streams, events between them, pinned memory and CUDA graphs.

This module has not run on a GPU; tests use a stand-in for it.
"""

import ctypes
import gc
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from wanforge.configs.targets import architecture
from wanforge.errors import ResourceError
from wanforge.plugins.launching.cubins import cache_folder as kernel_cache
from wanforge.runtime.memory.device import Copies, Event, Work


class Cuda:
    """One GPU with two streams: one that computes and becomes PyTorch's current stream, and one that copies.

    Raises:
        ResourceError: PyTorch sees no GPU.
    """

    has_memory = True

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ResourceError("this needs an NVIDIA GPU, and PyTorch sees none; run: wanforge doctor")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.pool = torch.cuda.graph_pool_handle()
        self.computing, self.copying = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.set_stream(self.computing)  # TensorRT needs a stream that is not the default one
        self._copies = Copies(partial(torch.cuda.set_device, self.device))

    @property
    def sm(self) -> int:
        return architecture(*torch.cuda.get_device_capability(self.device))

    @property
    def name(self) -> str:
        """The names of the GPU and its driver, in a form that fits a file name."""
        properties = torch.cuda.get_device_properties(self.device)
        return f"{properties.name} {driver_version()}".replace(" ", "-").replace("/", "-")

    def join(self) -> None:
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(self.computing)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def stream(self) -> int:
        """The handle of the current stream: the computing stream, or one that is being captured."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def pinned(self, size: int) -> Tensor | None:
        """Memory that does not come from PyTorch's own allocator, which rounds sizes up to a power of two."""
        memory = torch.empty(size, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(memory.data_ptr(), size, 0)):
            return None
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
        return memory

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event) -> Event:
        self.copying.wait_event(after)
        self.copying.wait_stream(torch.cuda.current_stream(self.device))  # where sources on the GPU were computed
        with torch.cuda.stream(self.copying):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self.copying)
        return self.copying.record_event()

    def prepare(self, copy: Callable[[], Event]) -> "Future[Event]":
        return self._copies.start(copy)

    def mark(self) -> Event:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def record(self, work: Work) -> Work:
        """Capture a CUDA graph. All graphs have their temporary tensors in the same memory, since they run in turns."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, self.computing, capture_error_mode="thread_local"):
            work()
        replay: Work = graph.replay
        return replay

    def synchronise(self) -> None:
        self._copies.finish()
        torch.cuda.current_stream(self.device).synchronize()
        self.copying.synchronize()

    def reclaim(self) -> None:
        self.synchronise()
        gc.collect()
        torch.cuda.empty_cache()


@cache
def gpu() -> Cuda:
    """The GPU of this process, with the streams that all backends share.

    Raises:
        ResourceError: PyTorch sees no GPU.
    """
    return Cuda()


def driver_version() -> str:
    """The newest CUDA version that the installed NVIDIA driver supports; empty where there is no driver.

    Raises:
        ResourceError: The driver is installed but does not answer.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        raise ResourceError("NVIDIA's driver does not answer")
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def cache_folder() -> Path:
    """The folder of TensorRT-RTX's own cache files."""
    return kernel_cache().with_name("tensorrt")


def cache_file(library: str, gpu: str) -> Path:
    """The cache file for a version of the library, a GPU and its driver."""
    return cache_folder() / f"{library.replace(' ', '-')}-{gpu}.cache"
