"""Every kernel, compiled for each kind of architecture, computes what the definitions say, on the machine for PTX."""

from pathlib import Path

import msgspec
import pytest
import torch

from tools.ptx.bench import Bench
from tools.ptx.cases import cases
from tools.ptx.proof import compile_cases, prove
from tools.ptx.sizes import MANY, SHORT
from wanforge.configs.tiles import Tile
from wanforge.plugins.launching import call, launch
from wanforge.plugins.launching.cubins import CubinStore

pytestmark = pytest.mark.slow
NORM = "layer_norm.norm_measured"


@pytest.mark.parametrize("sm", [*(pytest.param(sm, marks=pytest.mark.exhaustive) for sm in (80, 89, 90, 100)), 120])
def test_kernels_are_the_reference(folder: Path, sm: int) -> None:
    asked = list(cases(sm, torch.bfloat16, SHORT))
    compile_cases(asked, sm, folder)
    outcomes = [prove(case, Bench(sm, folder)) for case in asked]
    assert len(outcomes) == {80: 43, 120: 54}.get(sm, 44)
    assert [outcome for outcome in outcomes if not outcome.is_right] == []


@pytest.mark.exhaustive
def test_products_find_every_tile_and_every_slab(folder: Path) -> None:
    """Several columns of programs, a last group with fewer row tiles, and slots that are used for the third time."""
    asked = [case for case in cases(90, torch.bfloat16, MANY) if "by tiles" in case.name]
    compile_cases(asked, 90, folder)
    outcomes = [prove(case, Bench(90, folder)) for case in asked]
    assert len(outcomes) == 5
    assert [outcome for outcome in outcomes if not outcome.is_right] == []


@pytest.mark.parametrize(
    ("sm", "count"),
    [
        pytest.param(89, 2, marks=pytest.mark.exhaustive),
        (90, 2),
        (100, 2),
        pytest.param(120, 3, marks=pytest.mark.exhaustive),
    ],
)
def test_attention_finds_every_block_of_keys(folder: Path, sm: int, count: int) -> None:
    """Odd numbers of blocks, of which the last has no partner on sm_90 and sm_100, and slots that are used again."""
    asked = [case for case in cases(sm, torch.bfloat16, MANY) if case.name.startswith("attention sage_fp8")]
    compile_cases(asked, sm, folder)
    outcomes = [prove(case, Bench(sm, folder)) for case in asked]
    assert len(outcomes) == count
    assert [outcome for outcome in outcomes if not outcome.is_right] == []


def test_norms_of_known_moments_go_through_many_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So few rows would get a program for each tile, where those of a clip get one for twelve."""
    tile_for = launch.tile_for

    def long(kernel: str, sm: int) -> Tile:
        tile = tile_for(kernel, sm)
        return msgspec.structs.replace(tile, blocks=tile.blocks | {"PROGRAMS": 1}) if kernel == NORM else tile

    monkeypatch.setattr(call, "tile_for", long)
    asked = [case for case in cases(90, torch.bfloat16, SHORT) if "of known moments" in case.name]
    compile_cases(asked, 90, folder)
    outcomes = [prove(case, Bench(90, folder)) for case in asked]
    norms = [cubin for cubin in CubinStore(folder).cubins().values() if cubin.kernel == NORM]
    assert 1 in {cubin.constants["PROGRAMS"] for cubin in norms}
    assert [outcome for outcome in outcomes if not outcome.is_right] == []
