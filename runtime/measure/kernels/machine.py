"""What numbers are taken on and with."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from wanforge import __version__
from wanforge.configs.targets import Target, load_targets

DEVICES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""Targets by what PyTorch calls the GPU, where that is not NVIDIA and the target's title."""


def target_name(gpu: str) -> str | None:
    """The target that a GPU is, by PyTorch's name for it; None where it is not one of `configs/targets.toml`, or a
    variant."""
    known = {f"NVIDIA {target.title}": name for name, target in load_targets().items()}
    return (known | DEVICES).get(gpu)


def target_of(gpu: str) -> Target | None:
    """The peaks of a GPU by PyTorch's name for it, where they are known."""
    name = target_name(gpu)
    return None if name is None else load_targets()[name]


def machine_of(device: torch.device) -> dict[str, str | None]:
    """What the numbers were taken on and with."""
    has_gpu = device.type == "cuda"
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if has_gpu else None
    return {
        "gpu": torch.cuda.get_device_name(device) if has_gpu else None,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "triton": installed("triton"),
        "wanforge": __version__,
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit that this code is of, where it is a checkout; ``-dirty`` where files have changed since."""
    file = Path(__file__).resolve()
    git = ("git", "-C", str(file.parent))
    if not said(*git, "ls-files", file.name):
        return None
    return said(*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def said(*command: str) -> str | None:
    """What a program prints, None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
