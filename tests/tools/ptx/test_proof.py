"""Every kernel, compiled for each kind of architecture, computes what the definitions say, on the machine for PTX."""

from pathlib import Path

import pytest
import torch

from tools.ptx.bench import Bench
from tools.ptx.cases import cases
from tools.ptx.proof import compile_cases, prove
from tools.ptx.sizes import SHORT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sm", [80, 89, 90, 120])
def test_kernels_are_the_reference(folder: Path, sm: int) -> None:
    asked = list(cases(sm, torch.bfloat16, SHORT))
    compile_cases(asked, sm, folder)
    outcomes = [prove(case, Bench(sm, folder)) for case in asked]
    assert len(outcomes) == 22
    assert [outcome for outcome in outcomes if not outcome.is_right] == []


@pytest.mark.parametrize("name", ["attention sla, 200 tokens", "attention sage_fp8, 200 tokens"])
def test_kernels_with_tensor_memory_are_the_reference(folder: Path, name: str) -> None:
    (case,) = [case for case in cases(100, torch.bfloat16, SHORT) if case.name.startswith(name)]
    assert prove(case, Bench(100, folder)).is_right
