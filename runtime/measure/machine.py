"""The machine and the versions with which numbers were measured, and which of these make numbers comparable."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from wanforge.configs.targets import Target, load_targets
from wanforge.version import __version__, commit, output_of

Facts = dict[str, str | int | float | None]

PACKAGES = ("onnxruntime-gpu", "onnxruntime", "tensorrt-rtx", "tensorrt", "diffusers", "numpy")

COMPARABLE = ("cpu", "processors", "gpu", "driver")
"""Numbers are compared only where all of these are the same."""

DEVICES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""Targets by PyTorch's name for the GPU, where that is not ``NVIDIA`` followed by the target's title."""


def device_here() -> torch.device:
    """The GPU, or the CPU where there is none."""
    has_gpu = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")


def fingerprint() -> Facts:
    """Everything about this machine and this code that a number may depend on."""
    import psutil

    frequency = psutil.cpu_freq()
    device = device_here()
    return {
        "cpu": cpu_name(),
        "processors": len(os.sched_getaffinity(0)),
        "clock_mhz": round(frequency.max or frequency.current) if frequency else None,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
        **gpu_facts(device),
        "gpu_clock_mhz": gpu_clock() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := installed(package))},
    }


def gpu_facts(device: torch.device) -> dict[str, str | None]:
    """The GPU, its driver, and the versions of the software that runs on it."""
    has_gpu = device.type == "cuda"
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if has_gpu else None
    return {
        "gpu": torch.cuda.get_device_name(device) if has_gpu else None,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "triton": installed("triton"),
        "wanforge": __version__,
        "commit": commit(),
    }


def target_name(gpu: str) -> str | None:
    """The name of a GPU's target, from PyTorch's name for the GPU; None where `configs/targets.toml` lacks it."""
    known = {f"NVIDIA {target.title}": name for name, target in load_targets().items()}
    return (known | DEVICES).get(gpu)


def target_of(gpu: str) -> Target | None:
    """The target of a GPU, from PyTorch's name for the GPU; None where it is unknown."""
    name = target_name(gpu)
    return None if name is None else load_targets()[name]


def cpu_name() -> str:
    """The processor, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_clock() -> str | None:
    """Current and highest clock of the GPU's multiprocessors, in MHz."""
    return output_of("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader")


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
