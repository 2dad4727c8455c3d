"""Every kernel, compiled for each kind of architecture, computes what the definitions say, on the machine for PTX."""

from pathlib import Path

import pytest
import torch

from tools.ptx.bench import Bench
from tools.ptx.cases import cases
from tools.ptx.proof import compile_cases, prove
from tools.ptx.sizes import SHORT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_kernels_are_the_reference(folder: Path, sm: int) -> None:
    asked = list(cases(sm, torch.bfloat16, SHORT))
    compile_cases(asked, sm, folder)
    outcomes = [prove(case, Bench(sm, folder)) for case in asked]
    assert len(outcomes) == (29 if sm >= 89 else 28)
    assert [outcome for outcome in outcomes if not outcome.is_right] == []
