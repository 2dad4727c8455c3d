"""The parts that compare the kernels of every op with their definitions and time them at a model's sizes."""

from functools import partial
from itertools import islice
from typing import Any

import torch

from tools.gpu_day.day import Day
from wanforge.runtime.measure.cost.launches import seconds
from wanforge.runtime.measure.cost.prediction import predicted_seconds
from wanforge.runtime.measure.kernels.cases import OPS
from wanforge.runtime.measure.kernels.checks import check
from wanforge.runtime.measure.kernels.pieces import SMALL, CheckedSize, timed_size
from wanforge.runtime.measure.kernels.timing import Case, Draw, measure

COMPILED = "torch.compile"
"""What the names of baselines contain whose compiler takes long."""
ORDER = ("block", *(name for name in OPS if name != "block"))


def run(day: Day) -> None:
    """Check each op and time its cases: the kernels, and the baselines that need no compiler.

    Ops are checked at a small ragged size, which a rehearsal leaves to the sweeps, and at the size that is timed.
    """
    timed = timed_size(day.workload)
    for op in ORDER:
        for size in [timed] if day.rehearses else [SMALL, timed]:
            day.once("check", f"{op}, {size.tokens} tokens", partial(_verdicts, day, op, size))
        wrong = {line["op"] for line in day.results.of(day.part, "check") if not line["passed"]}
        for case in islice(OPS[op](day.workload), day.scale.cases):
            without = {name: run for name, run in case.baselines.items() if COMPILED not in name}
            reduced = Case(case.name, case.costs, case.inputs, case.kernel, without)
            day.once("case", case.name, partial(_timed, day, op, reduced, op in wrong))


def run_baselines(day: Day) -> None:
    """Time the cases that have baselines for PyTorch's compiler, and those baselines."""
    for op in ORDER:
        for case in islice(OPS[op](day.workload), day.scale.cases):
            compiled = {name: run for name, run in case.baselines.items() if COMPILED in name}
            if compiled and not day.rehearses:
                only = Case(case.name, case.costs, case.inputs, case.kernel, compiled)
                day.once("case", case.name, partial(_timed, day, op, only, False))


def _verdicts(day: Day, op: str, size: CheckedSize) -> dict[str, Any]:
    verdicts = check(op, day.device.device, day.dtype, size)
    _empty_cache(day)
    passed = all(each.passed for each in verdicts)
    return {"op": op, "passed": passed, "verdicts": [each.as_json() for each in verdicts]}


def _timed(day: Day, op: str, case: Case, is_wrong: bool) -> dict[str, Any]:
    """The times of a case. Those of an op with wrong results are kept as well, and marked."""
    draw = partial(Draw, device=day.device.device, dtype=day.dtype)
    times, missing = measure(case, draw, day.device.timer, day.scale.repeats)
    target = day.device.target
    _empty_cache(day)
    return {
        "op": op,
        "is_wrong": is_wrong,
        "flops": case.flops,
        "bytes": case.bytes,
        "times": {name: each.as_json() for name, each in times.items()},
        "missing": missing,
        "predicted_ms": target and 1000 * predicted_seconds(case.costs, target),
        "roofline_ms": target and 1000 * seconds(case.costs, target),
    }


def _empty_cache(day: Day) -> None:
    """Give back the memory of a case, so that the next one has all of it."""
    if day.device.device.type == "cuda":
        torch.cuda.empty_cache()
