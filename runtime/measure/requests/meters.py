"""Measures memory and energy while a ``with`` block runs. What this machine cannot measure is None."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch

INTERVAL = 0.01
"""Seconds between two readings of the memory in use."""


@dataclass
class ResourceUse:
    """The measurements, complete once the block has ended.

    Attributes:
        host_bytes: Peak memory of this process.
        device_bytes: Peak memory in use on the GPU, by all processes.
        joules: Energy that the GPU used.
    """

    seconds: float = 0.0
    host_bytes: int = 0
    device_bytes: int | None = None
    joules: float | None = None


class Nvml:
    """NVIDIA's management library for PyTorch's current GPU, from the package nvidia-ml-py."""

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle = library, handle

    @classmethod
    def open(cls) -> "Nvml | None":
        """Open the library; None where the package, the driver or the GPU is missing."""
        if not torch.cuda.is_available():
            return None
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            # The two libraries number GPUs differently; both know the UUID.
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except pynvml.NVMLError:
            return None

    def used_bytes(self) -> int:
        return int(self.library.nvmlDeviceGetMemoryInfo(self.handle).used)

    def joules(self) -> float | None:
        """Energy used since the driver was loaded; None on GPUs before Volta."""
        try:
            return float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000
        except self.library.NVMLError:
            return None


@contextmanager
def metered(nvml: Nvml | None) -> Iterator[ResourceUse]:
    """Measure memory and energy while the ``with`` block runs."""
    import psutil

    reading, process, ended = ResourceUse(), psutil.Process(), Event()

    def look() -> None:
        reading.host_bytes = max(reading.host_bytes, process.memory_info().rss)
        if nvml is not None:
            reading.device_bytes = max(reading.device_bytes or 0, nvml.used_bytes())

    def watch() -> None:
        while not ended.wait(INTERVAL):
            look()

    look()
    watcher = Thread(target=watch, daemon=True)
    before, start = nvml.joules() if nvml is not None else None, time.perf_counter()
    watcher.start()
    try:
        yield reading
    finally:
        reading.seconds = time.perf_counter() - start
        ended.set()
        watcher.join()
        look()
        after = nvml.joules() if nvml is not None else None
        if before is not None and after is not None:
            reading.joules = after - before
