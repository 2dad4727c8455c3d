"""The part that compares TinyWan's clips on this device with the reference, at every depth."""

from pathlib import Path
from typing import Any

import torch

from tools.gpu_day.day import Day
from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.commands.import_ import import_
from wanforge.runtime.backends.torch import TorchBackend, gpu_or_host
from wanforge.runtime.measure.parity.comparison import DEPTHS, Contender, compare, compare_pipelines
from wanforge.runtime.measure.parity.report import text
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request
from wanforge.whole_file import temporary_folder


def run(day: Day) -> None:
    """Compare the backend `cuda`, then the reference itself where PyTorch computes it on the GPU, with the
    reference on the CPU."""
    with temporary_folder() as folder:
        import_.main(["--recipe", "w8a8", "--out", str(folder / "bundle")], standalone_mode=False)
        day.once("parity", "kernels", lambda: _kernels(day, folder / "bundle"))
        day.once("parity", "torch", lambda: _torch(day, folder / "bundle"))


def _request(day: Day, bundle: Bundle) -> Request:
    return Request(bundle.model.example_prompt, day.shape, steps=day.scale.steps)


def _kernels(day: Day, root: Path) -> dict[str, Any]:
    bundle = Bundle.open(root)
    depths = ("block",) if day.rehearses else DEPTHS
    found = compare(bundle, Contender("cuda", dtype=day.dtype), _request(day, bundle), depths=depths)
    return {"passed": found.passed, "text": text(found)}


def _torch(day: Day, root: Path) -> dict[str, Any]:
    bundle = Bundle.open(root)
    reference = Pipeline(bundle, TorchBackend(bundle, torch.float32))
    other = Pipeline(bundle, TorchBackend(bundle, day.dtype, on=gpu_or_host()))
    depths = ("block",) if day.rehearses else ("block", "step", "clip")
    found = compare_pipelines(reference, other, _request(day, bundle), depths)
    return {"passed": found.passed, "text": text(found)}
