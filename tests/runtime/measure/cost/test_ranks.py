"""What several GPUs take together is what one takes, and the exchange is what the shapes make it."""

import re
from pathlib import Path

import pytest

from tools.pages.kernels import LARGE, SMALL, fused, with_tables
from tools.pages.several_gpus import TABLES
from wanforge.configs.targets import load_targets
from wanforge.errors import ConfigError
from wanforge.runtime.measure.cost.fused import fused_step
from wanforge.runtime.measure.cost.prediction import predicted_seconds
from wanforge.runtime.measure.cost.ranks import exchanged_bytes, predicted_step, step_share

PAGE = Path(__file__).parents[4] / "docs" / "several_gpus.md"


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_divide_the_operations(ranks: int) -> None:
    w = fused(SMALL)
    whole = sum(launch.total_flops for launch in fused_step(w) if not launch.name.startswith("time"))
    mine = sum(launch.total_flops for launch in step_share(w, ranks) if not launch.name.startswith("time"))
    assert w.L == 32760
    assert ranks * mine == pytest.approx(whole, rel=4e-4)  # 256 tiles of tokens are 32768 rows


def test_exchanged_bytes_are_what_was_worked_out_by_hand() -> None:
    # Of two ranks, the one with 16384 tokens gives away half of q, k and v, and gets half of what attention computes.
    layer = 4 * 2 * 16384 * 1536 // 2
    assert exchanged_bytes(fused(SMALL), 2) == 30 * layer + 4 * 64 * 16384


def test_a_faster_link_shortens_the_exchange_alone() -> None:
    slow, fast = (predicted_step(fused(LARGE), 2, load_targets()["h100"], rate) for rate in (63.0, 630.0))
    assert slow.computing == fast.computing
    assert slow.exchanging == pytest.approx(10 * fast.exchanging)
    assert fast.seconds < predicted_seconds(fused_step(fused(LARGE)), load_targets()["h100"])


def test_heads_must_be_divisible() -> None:
    with pytest.raises(ConfigError, match="12 heads cannot be divided evenly among 8 GPUs"):
        exchanged_bytes(fused(SMALL), 8)


@pytest.mark.slow
def test_the_page_holds_these_tables() -> None:
    page = PAGE.read_text()
    assert sorted(re.findall(r"<!-- table: (\S+) -->", page)) == sorted(TABLES)
    assert with_tables(page, TABLES) == page, "run: python -m tools.pages.several_gpus docs/several_gpus.md"
