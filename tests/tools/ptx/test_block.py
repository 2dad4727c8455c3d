"""A layer of TinyWan, all of its kernels together and compiled, computes what the definition says, on the machine for
PTX."""

from pathlib import Path

import pytest
import torch

from tools.ptx.bench import Bench
from tools.ptx.cases import cases
from tools.ptx.proof import prove
from tools.ptx.sizes import WHOLE


@pytest.mark.slow
def test_a_block_is_the_reference(folder: Path) -> None:
    """The limit is that of parity for a block in bfloat16, where a step or a key block more moves what follows."""
    case = next(case for case in cases(90, torch.bfloat16, WHOLE) if case.name == "block of tinywan, w8a8")
    assert case.rms == 0.1
    outcome = prove(case, Bench(90, folder))
    assert outcome.is_right, outcome
    assert len(outcome.kernels) == 13  # two for products: one of 384 outputs is no multiple of 256
