"""What the `trt` backend asks of CUDA, through PyTorch: two streams, events between them, pinned memory, graphs.

Has not run on a GPU; tests put a stand-in in its place.
"""

import ctypes
import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanforge.errors import ResourceError
from wanforge.host import available_bytes
from wanforge.plugins.launching.cubins import cache_folder as kernel_cache
from wanforge.runtime.memory.residency import Group, GroupName

Event = Any

KEPT_FREE = 4_000_000_000
"""Bytes of the machine's memory that pinning leaves alone."""


class Cuda:
    """One GPU: a stream that computes, which becomes PyTorch's current one, and one that copies.

    Raises:
        ResourceError: PyTorch sees no GPU.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ResourceError("the backend trt needs an NVIDIA GPU, and PyTorch sees none; see: wanforge doctor")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.computing, self.copying = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.set_stream(self.computing)  # TensorRT wants one that is not the default

    @property
    def sm(self) -> int:
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    @property
    def name(self) -> str:
        """GPU and driver, as a file may be called."""
        properties = torch.cuda.get_device_properties(self.device)
        return f"{properties.name} {driver_version()}".replace(" ", "-").replace("/", "-")

    def free_bytes(self) -> int:
        """Of the GPU's memory."""
        return torch.cuda.mem_get_info(self.device)[0]

    def stream(self) -> int:
        """The current stream: the computing one, or one that is being captured."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def pinned(self, size: int) -> Tensor | None:
        """Memory of the machine that a GPU copies from by itself; None where the driver gives no more of it. Not
        PyTorch's own, which is rounded up to a power of two."""
        memory = torch.empty(size, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(memory.data_ptr(), size, 0)):
            return None
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
        return memory

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event) -> Event:
        """Copy each second tensor into the first, on the copying stream, after an event; gives the event of its end."""
        self.copying.wait_event(after)
        with torch.cuda.stream(self.copying):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self.copying.record_event()

    def mark(self) -> Event:
        """An event after all that was launched up to now."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Event) -> None:
        """Let what is launched from now on wait for an event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what a function launches into a graph, which the result replays. Nothing runs meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.computing, capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def synchronise(self) -> None:
        """Wait until everything launched is done, copies as well."""
        torch.cuda.current_stream(self.device).synchronize()
        self.copying.synchronize()

    def reclaim(self) -> None:
        """Give memory that is no longer used back to the GPU, once nothing runs that might use it."""
        self.synchronise()
        gc.collect()
        torch.cuda.empty_cache()


class StreamMover:
    """Copies groups into slots on the copying stream.

    Groups that share a slot are copied again and again: each is kept packed in pinned memory, while there is enough.

    Args:
        slots: the bytes of each.
        source: the mapped tensors of a component.
        returning: groups that will be copied more than once.
        packed: where those are kept.
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
        self._ready: dict[int, Event] = {}
        # What used this memory before the slots were in it must be done with it, too.
        self._released: dict[int, Event] = dict.fromkeys(range(len(slots)), cuda.mark())

    def fetch(self, slot: int, group: Group) -> None:
        self._ready[slot] = self.cuda.copy(self._pairs(slot, group), self._released[slot])

    def _pairs(self, slot: int, group: Group) -> list[tuple[Tensor, Tensor]]:
        memory, tensors = self.slots[slot], self.source(group.name.component)
        if group.name in self.returning and group.name not in self.packed:
            self._pack(group, tensors)
        if group.name in self.packed:
            return [(memory[: group.bytes], self.packed[group.name])]
        return [(view, tensors[name]) for name, view in group.views(memory).items()]

    def _pack(self, group: Group, tensors: Mapping[str, Tensor]) -> None:
        """Keep a group in pinned memory, if there is enough of it."""
        if available_bytes() <= group.bytes + KEPT_FREE or (packed := self.cuda.pinned(group.bytes)) is None:
            return
        for name, view in group.views(packed).items():
            view.copy_(tensors[name])
        self.packed[group.name] = packed

    def wait(self, slot: int) -> None:
        if slot in self._ready:
            self.cuda.wait(self._ready.pop(slot))

    def release(self, slot: int) -> None:
        self._released[slot] = self.cuda.mark()


def driver_version() -> str:
    """The newest CUDA that NVIDIA's driver here can run; empty where there is no driver.

    Raises:
        ResourceError: there is one, and it does not answer.
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
    """Where TensorRT-RTX's own caches are kept."""
    return kernel_cache().with_name("tensorrt")


def cache_file(library: str, gpu: str) -> Path:
    """The one for a version, a GPU and its driver."""
    return cache_folder() / f"{library.replace(' ', '-')}-{gpu}.cache"
