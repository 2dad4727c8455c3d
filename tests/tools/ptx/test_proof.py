"""Every kernel, compiled for each kind of architecture, computes what the definitions say, on the machine for PTX."""

from pathlib import Path

import pytest
import torch

from tools.ptx.bench import Bench
from tools.ptx.cases import cases
from tools.ptx.proof import prove
from tools.ptx.sizes import RAGGED, WHOLE

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@slow
@pytest.mark.parametrize("sm", [80, 89, 90, 120])
def test_kernels_are_the_reference(folder: Path, sm: int) -> None:
    outcomes = [prove(case, Bench(sm, folder)) for case in cases(sm, torch.bfloat16, RAGGED)]
    assert len(outcomes) == 35
    assert [outcome for outcome in outcomes if not outcome.is_right] == []


@slow
def test_a_whole_block_is_the_reference(folder: Path) -> None:
    """The limit is that of parity for a block in bfloat16, where a step or a key block more moves what follows."""
    case = next(case for case in cases(90, torch.bfloat16, WHOLE) if case.name == "block of tinywan, w8a8")
    assert case.rms == 0.1
    outcome = prove(case, Bench(90, folder))
    assert outcome.is_right, outcome
    assert len(outcome.kernels) == 10
