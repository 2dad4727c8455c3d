"""Wavefronts of shared memory, counted by hand, and what the package's table says of a kernel."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tools.ptx.banks import Conflicts, wavefronts
from tools.ptx.bench import Bench
from tools.ptx.cases import cases
from tools.ptx.proof import copies
from tools.ptx.sizes import RAGGED
from wanforge.runtime.measure.machine_code.rates import conflicts_of

LANES = np.arange(32)


@pytest.mark.parametrize(
    ("addresses", "size", "taken", "least"),
    [
        (4 * LANES, 4, 1, 1),
        (0 * LANES, 4, 1, 1),  # one word for all
        (128 * LANES, 4, 32, 1),  # all in bank 0
        (8 * LANES, 4, 2, 1),
        (2 * LANES, 2, 1, 1),
        (8 * LANES, 8, 2, 2),
        (16 * LANES, 16, 4, 4),
        (128 * LANES, 16, 32, 4),  # rows of a matrix that are not swizzled
        (128 * LANES + 16 * (LANES % 8), 16, 4, 4),  # and that are
    ],
)
def test_wavefronts(addresses: np.ndarray, size: int, taken: int, least: int) -> None:
    assert wavefronts(addresses, size, LANES) == (taken, least)


def test_warps_do_not_get_into_each_others_way() -> None:
    lanes = np.arange(64)
    assert wavefronts(4 * (lanes % 32), 4, lanes) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [89, 120])
def test_the_table_is_what_the_machine_counts(sm: int, folder: Path) -> None:
    conflicts = Conflicts()
    (case,) = (
        case for case in cases(sm, torch.bfloat16, RAGGED) if case.name == "modulated layer norm, quantised, 37x1536"
    )
    with conflicts.counting():
        Bench(sm, folder)(case.run, *copies(case.inputs()))
    assert conflicts.factors == {"layer_norm.norm": conflicts_of("layer_norm.norm", sm)}
