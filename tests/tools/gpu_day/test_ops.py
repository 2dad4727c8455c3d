"""Ops are checked at two sizes, and an op that is wrong at one of them is timed as a wrong one."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tools.gpu_day import ops
from tools.gpu_day.day import FULL, Day, Paths
from tools.gpu_day.results import Results
from wanforge.runtime.measure.cost.launches import Workload
from wanforge.runtime.measure.kernels.checks import KernelVerdict
from wanforge.runtime.measure.kernels.pieces import SMALL, CheckedSize

TIMED = 21 * 30 * 52
"""Tokens of the 1.3B's clip at 480p."""


@pytest.mark.parametrize("wrong_at", [SMALL.tokens, TIMED])
def test_ops_are_checked_small_and_at_the_size_that_is_timed(
    wrong_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(op: str, device: torch.device, dtype: torch.dtype, size: CheckedSize) -> list[KernelVerdict]:
        error = 1.0 if op == "layer_norm" and size.tokens == wrong_at else 0.0
        return [KernelVerdict(op, "norm", size.tokens, error, limit=0.5)]

    def timed(day: Day, op: str, case: Any, is_wrong: bool) -> dict[str, Any]:
        return {"op": op, "is_wrong": is_wrong}

    def cases(w: Workload, op: str) -> Iterator[Any]:
        yield SimpleNamespace(name=op, costs=(), inputs=None, kernel=None, baselines={})

    monkeypatch.setattr(ops, "check", check)
    monkeypatch.setattr(ops, "_timed", timed)
    monkeypatch.setattr(ops, "ORDER", ("layer_norm", "rms_norm_rope"))
    for op in ops.ORDER:
        monkeypatch.setitem(ops.OPS, op, partial(cases, op=op))
    device: Any = SimpleNamespace(device=torch.device("cpu"), sm=90)
    options = {"model": "turbowan2.1-t2v-1.3b-480p"}
    day = Day("ops-1.3b", options, device, FULL, Results(tmp_path / "results.jsonl"), Paths(tmp_path, tmp_path))
    ops.run(day)
    checked = [(line["op"], line["verdicts"][0]["tokens"]) for line in day.results.of(day.part, "check")]
    assert checked == [(op, tokens) for op in ops.ORDER for tokens in (SMALL.tokens, TIMED)]
    assert {line["op"]: line["is_wrong"] for line in day.results.of(day.part, "case")} == {
        "layer_norm": True,
        "rms_norm_rope": False,
    }
