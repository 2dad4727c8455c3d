"""The tiles that are tried are whole tiles, each once, and there are some for every kernel but two."""

import pytest

from tools.gpu_day.variants import CHOICES, of_tile, variants
from wanforge.configs.tiles import load_tiles
from wanforge.plugins.launching.launch import tile_for

FIXED = {"tensor_memory_attention.attention", "warp_attention.attention"}
"""What has one tile only."""


def test_every_kernel_has_choices() -> None:
    assert CHOICES.keys() == load_tiles().keys()


@pytest.mark.parametrize("kernel", CHOICES)
def test_variants_are_whole_tiles_and_begin_with_the_present_one(kernel: str) -> None:
    present = tile_for(kernel, load_tiles()[kernel][-1].sms[0])
    found = variants(kernel, present, 99)
    assert found[0] == of_tile(present)
    assert len(found) == len(set(found))
    assert (len(found) == 1) == (kernel in FIXED)
    assert {name for each in found for name, _ in each.blocks} == present.blocks.keys()
    assert all(dict(each.blocks).keys() == present.blocks.keys() for each in found)
    assert variants(kernel, present, 2) == found[:2]
