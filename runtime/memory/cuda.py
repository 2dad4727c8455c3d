"""CUDA for the `trt` backend, through PyTorch: two streams, events between them, pinned memory and CUDA graphs.

Copies are prepared on a thread of their own, because pinning and packing the weights of a layer, or staging them from a
mapped file, takes the host much longer than launching the layer does.

This module has not run on a GPU; tests use a stand-in for it.
"""

import ctypes
import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanforge.configs.targets import architecture
from wanforge.errors import ResourceError
from wanforge.host import available_bytes
from wanforge.plugins.launching.cubins import cache_folder as kernel_cache
from wanforge.runtime.memory.residency import Group, GroupName

Event = Any

KEPT_FREE = 4_000_000_000
"""Bytes of the machine's memory that are never pinned."""


class Cuda:
    """One GPU with two streams: one that computes and becomes PyTorch's current stream, and one that copies.

    Raises:
        ResourceError: PyTorch sees no GPU.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ResourceError("the backend trt needs an NVIDIA GPU, and PyTorch sees none; run: wanforge doctor")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.computing, self.copying = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.set_stream(self.computing)  # TensorRT needs a stream that is not the default one
        self._preparing = ThreadPoolExecutor(1, "weights", torch.cuda.set_device, (self.device,))

    @property
    def sm(self) -> int:
        return architecture(*torch.cuda.get_device_capability(self.device))

    @property
    def name(self) -> str:
        """The names of the GPU and its driver, in a form that fits a file name."""
        properties = torch.cuda.get_device_properties(self.device)
        return f"{properties.name} {driver_version()}".replace(" ", "-").replace("/", "-")

    def free_bytes(self) -> int:
        """The free bytes of the GPU's memory."""
        return torch.cuda.mem_get_info(self.device)[0]

    def stream(self) -> int:
        """The handle of the current stream: the computing stream, or one that is being captured."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def pinned(self, size: int) -> Tensor | None:
        """Host memory that a GPU can copy from directly, or None where the driver gives no more of it.

        It does not come from PyTorch's own allocator, which rounds sizes up to a power of two.
        """
        memory = torch.empty(size, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(memory.data_ptr(), size, 0)):
            return None
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
        return memory

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event) -> Event:
        """Copy the second tensor of each pair into the first, on the copying stream, once an event has happened.

        Returns:
            The event that marks the end of the copies.
        """
        self.copying.wait_event(after)
        with torch.cuda.stream(self.copying):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self.copying.record_event()

    def prepare(self, copy: Callable[[], Event]) -> "Future[Event]":
        """Call a function that starts a copy, on the thread that does this for one copy after another."""
        return self._preparing.submit(copy)

    def mark(self) -> Event:
        """Record an event that follows everything launched so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Event) -> None:
        """Make everything launched from now on wait for an event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what a function launches in a CUDA graph, without running it; return a function that replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.computing, capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def synchronise(self) -> None:
        """Wait until everything launched has finished, including copies, and those that are still being prepared."""
        self._preparing.submit(lambda: None).result()  # the thread does one thing after another
        torch.cuda.current_stream(self.device).synchronize()
        self.copying.synchronize()

    def reclaim(self) -> None:
        """Return unused memory to the GPU, once nothing is running that might use it."""
        self.synchronise()
        gc.collect()
        torch.cuda.empty_cache()


class StreamMover:
    """Copies groups into slots on the copying stream.

    Groups that are copied more than once are kept packed in pinned memory as long as there is enough of it.

    Args:
        slots: The memory of each slot.
        source: Returns the mapped tensors of a component.
        returning: Groups that will be copied more than once.
        packed: Where those groups are kept packed.
    """

    def __init__(
        self,
        cuda: Cuda,
        slots: Sequence[Tensor],
        source: Callable[[str], Mapping[str, Tensor]],
        returning: frozenset[GroupName],
        packed: dict[GroupName, Tensor],
    ) -> None:
        self.cuda, self.slots, self.source, self.returning, self.packed = cuda, slots, source, returning, packed
        self._ready: dict[int, Future[Event]] = {}
        # Work that used this memory before the slots existed must also finish before a slot is written.
        self._released: dict[int, Event] = dict.fromkeys(range(len(slots)), cuda.mark())

    def fetch(self, slot: int, group: Group) -> None:
        self._ready[slot] = self.cuda.prepare(partial(self._copy, slot, group, self._released[slot]))

    @torch.inference_mode()
    def _copy(self, slot: int, group: Group, after: Event) -> Event:
        return self.cuda.copy(self._pairs(slot, group), after)

    def _pairs(self, slot: int, group: Group) -> list[tuple[Tensor, Tensor]]:
        memory, tensors = self.slots[slot], self.source(group.name.component)
        if group.name in self.returning and group.name not in self.packed:
            self._pack(group, tensors)
        if group.name in self.packed:
            return [(memory[: group.bytes], self.packed[group.name])]
        return [(view, tensors[name]) for name, view in group.views(memory).items()]

    def _pack(self, group: Group, tensors: Mapping[str, Tensor]) -> None:
        """Keep a copy of a group in pinned memory if there is enough of it."""
        if available_bytes() <= group.bytes + KEPT_FREE or (packed := self.cuda.pinned(group.bytes)) is None:
            return
        for name, view in group.views(packed).items():
            view.copy_(tensors[name])
        self.packed[group.name] = packed

    def wait(self, slot: int) -> None:
        if slot in self._ready:
            self.cuda.wait(self._ready.pop(slot).result())

    def release(self, slot: int) -> None:
        self._released[slot] = self.cuda.mark()


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
