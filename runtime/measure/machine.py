"""What numbers were taken on: processors, GPU and versions, and what of it makes numbers comparable."""

import os
import platform
from pathlib import Path

import psutil
import torch

from wanforge.runtime.measure.kernels.machine import installed, machine_of, said

Facts = dict[str, str | int | float | None]

PACKAGES = ("onnxruntime-gpu", "onnxruntime", "tensorrt-rtx", "tensorrt", "diffusers", "numpy")

COMPARABLE = ("cpu", "processors", "gpu", "driver")
"""Where one of these differs, so do the numbers: they are not compared."""


def fingerprint() -> Facts:
    """Everything about this machine and this code that a number may depend on."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    frequency = psutil.cpu_freq()
    return {
        "cpu": cpu_name(),
        "processors": len(os.sched_getaffinity(0)),
        "clock_mhz": round(frequency.max or frequency.current) if frequency else None,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
        **machine_of(device),
        "gpu_clock_mhz": gpu_clock() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version for package in PACKAGES if (version := installed(package))},
    }


def cpu_name() -> str:
    """The processor, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_clock() -> str | None:
    """Clock of the SMs now and at most, in MHz."""
    return said("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader")
