"""Checks ops and times those that are correct."""

from collections.abc import Sequence
from functools import partial
from itertools import product

import torch

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.topk import num_selected
from wanforge.progress import Progress, silent
from wanforge.runtime.measure.cost.launches import USUAL_TEXT_ROWS, Workload
from wanforge.runtime.measure.kernels.cases import OPS, recipe_on
from wanforge.runtime.measure.kernels.checks import check
from wanforge.runtime.measure.kernels.pieces import SMALL, timed_size
from wanforge.runtime.measure.kernels.report import KernelReport, KernelResult
from wanforge.runtime.measure.kernels.timing import CudaTimer, Draw, Timer, measure
from wanforge.runtime.measure.machine import gpu_facts, target_of


def workload(model: ModelConfig, shape: ClipShape, topk: float | None, device: torch.device) -> Workload:
    """A model making a clip in the number formats that the device supports.

    Raises:
        ConfigError: The top-k selects no key block.
    """
    recipe = recipe_on(device)
    selected = num_selected(recipe, shape, model.topk, topk)
    return Workload(model, shape, recipe, selected, USUAL_TEXT_ROWS)


def timer_for(device: torch.device) -> Timer | None:
    """The timer of a device; None for the CPU, where kernels are interpreted and their times mean nothing."""
    return CudaTimer(device) if device.type == "cuda" else None


def bench_ops(
    ops: Sequence[str],
    w: Workload,
    device: torch.device,
    timer: Timer | None,
    repeats: int = 50,
    progress: Progress = silent,
) -> KernelReport:
    """Check ops on a device, at a small size and at the size that is timed, and time those that are correct. Without a
    timer only the small size is checked, and nothing is timed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = [SMALL] if timer is None else [SMALL, timed_size(w)]
    verdicts = []
    for done, (op, size) in enumerate(product(ops, sizes), 1):
        verdicts += check(op, device, dtype, size)
        progress("check", done, len(ops) * len(sizes))
    wrong = {verdict.op for verdict in verdicts if not verdict.passed}
    cases = [(op, case) for op in ops if op not in wrong for case in OPS[op](w)]
    machine = gpu_facts(device)
    target, draw = target_of(machine["gpu"] or ""), partial(Draw, device=device, dtype=dtype)
    results = []
    for op, case in cases:
        times, missing = ({}, {}) if timer is None else measure(case, draw, timer, repeats, progress)
        results.append(KernelResult(op, case, times, missing, target))
    return KernelReport(w, machine, repeats, verdicts, results)
