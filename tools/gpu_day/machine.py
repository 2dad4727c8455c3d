"""The part that tells what the machine is, and what its GPU reaches: copying, and products of matrices by PyTorch."""

import json
import platform
import sys
from importlib.metadata import distributions
from statistics import median

import torch

from tools.gpu_day.day import Day
from wanforge.runtime.measure.kernels.timing import Run
from wanforge.runtime.measure.machine import fingerprint

COPIED_BYTES, SIDE = 4 << 30, 8192
"""Bytes of a copy's source, and the side of square matrices."""
SMALL_BYTES, SMALL_SIDE = 1 << 20, 128
RUNS = 10
NEEDED = (
    "msgspec",
    "ftfy",
    "wcwidth",
    "imageio-ffmpeg",
    "tokenizers",
    "onnx",
    "cuda-bindings",
    "nvidia-ml-py",
    "pytest",
)
"""Packages whose absence explains failures."""


def run(day: Day) -> None:
    """Keep the facts of the machine, then its ceilings."""
    known = {each.metadata["Name"].lower().replace("_", "-") for each in distributions() if each.metadata["Name"]}
    facts = {
        **fingerprint(),
        "executable": sys.executable,
        "kernel": platform.release(),
        "missing": [name for name in NEEDED if name not in known],
        "sm": day.device.sm,
    }
    day.add("facts", facts=json.loads(json.dumps(facts, default=str)))
    day.once("ceiling", "copy", lambda: {"gbs": _copy(day) / 1e9})
    day.once("ceiling", "bf16 product", lambda: {"tflops": _product(day) / 1e12})
    day.once("ceiling", "int8 product", lambda: {"tflops": _integers(day) / 1e12})


def _seconds(day: Day, work: Run) -> float:
    work()
    return median(day.device.timer.seconds(work) for _ in range(1 if day.rehearses else RUNS))


def _copy(day: Day) -> float:
    """Bytes per second of a copy on the device, read and written."""
    size = SMALL_BYTES if day.rehearses else COPIED_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=day.device.device)
    target = torch.ones_like(source)
    return 2 * size / _seconds(day, lambda: target.copy_(source))


def _product(day: Day) -> float:
    """Operations per second of a product of random bfloat16 matrices."""
    side = SMALL_SIDE if day.rehearses else SIDE
    a, b = (torch.randn(side, side, device=day.device.device).to(torch.bfloat16) for _ in range(2))
    return 2 * side**3 / _seconds(day, lambda: a @ b)


def _integers(day: Day) -> float:
    """Operations per second of a product of random int8 matrices."""
    side = SMALL_SIDE if day.rehearses else SIDE
    a, b = (torch.randint(-128, 128, (side, side), dtype=torch.int8, device=day.device.device) for _ in range(2))
    return 2 * side**3 / _seconds(day, lambda: torch._int_mm(a, b.T))
