"""What `wanforge bench op` checks on a GPU, in bfloat16, passes on the machine for PTX, so its limits hold for compiled
kernels too, and not only for the interpreter."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tools.ptx.bench import Bench, compile_for
from wanforge.runtime.measure.kernels.cases import OPS
from wanforge.runtime.measure.kernels.checks import CHECKS, check
from wanforge.runtime.measure.kernels.pieces import CheckedSize
from wanforge.runtime.measure.kernels.timing import Draw

SIZE = CheckedSize((1, 3, 57), dim=256, ffn_dim=384, num_selected=2, text_rows=21)


class Blank(Draw):
    """Draws tensors without values."""

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("meta"), torch.bfloat16

    def __call__(self, *shape: int, size: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype)


LONG = ("w8a8_linear", "dense_attention", "int8_convolution", "block")
"""Ops that take long to compile."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "op",
    [
        pytest.param(op, marks=[pytest.mark.exhaustive] if op in LONG else [])
        for op in OPS
        if op != "sparse_linear_attention"  # of which the block consists
    ],
)
def test_the_checks_of_a_gpu_pass(op: str, folder: Path) -> None:
    def claims() -> Sequence[object]:
        return list(CHECKS[op](Blank(), SIZE))

    bench = Bench(89, folder)
    compile_for(claims, 89, folder)
    with bench.running():
        verdicts = check(op, torch.device("cpu"), torch.bfloat16, SIZE)
    assert [str(verdict) for verdict in verdicts if not verdict.passed] == []
