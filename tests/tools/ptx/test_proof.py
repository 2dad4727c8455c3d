"""Every kernel, compiled for each kind of architecture, computes what the definitions say, on the machine for PTX."""

from pathlib import Path

import pytest
import torch

from tools.ptx.bench import Bench
from tools.ptx.cases import cases
from tools.ptx.proof import compile_cases, prove
from tools.ptx.sizes import MANY, SHORT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_kernels_are_the_reference(folder: Path, sm: int) -> None:
    asked = list(cases(sm, torch.bfloat16, SHORT))
    compile_cases(asked, sm, folder)
    outcomes = [prove(case, Bench(sm, folder)) for case in asked]
    assert len(outcomes) == (29 if sm >= 89 else 28)
    assert [outcome for outcome in outcomes if not outcome.is_right] == []


def test_products_find_every_tile_and_every_slab(folder: Path) -> None:
    """Several columns of programs, a last group with fewer row tiles, and slots that are used for the third time."""
    asked = [case for case in cases(90, torch.bfloat16, MANY) if "by tiles" in case.name]
    compile_cases(asked, 90, folder)
    outcomes = [prove(case, Bench(90, folder)) for case in asked]
    assert len(outcomes) == 3
    assert [outcome for outcome in outcomes if not outcome.is_right] == []
