"""What several GPUs take together is what one takes, and the exchange is what the shapes make it."""

import re
from pathlib import Path

import pytest

from tools.pages.kernels import LARGE, SMALL, fused, with_tables
from tools.pages.several_gpus import TABLES
from wanforge.configs.targets import load_targets
from wanforge.errors import ConfigError
from wanforge.runtime.measure.cost.decoder import decoder_chunk
from wanforge.runtime.measure.cost.fused import fused_step
from wanforge.runtime.measure.cost.prediction import predicted_seconds
from wanforge.runtime.measure.cost.ranks import (
    busiest_rank,
    decoder_share,
    exchanged_bytes,
    predicted_step,
    step_share,
)

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


@pytest.mark.slow
def test_strips_divide_the_operations() -> None:
    """A strip computes two rows again in every convolution."""
    w = fused(SMALL)
    whole = sum(launch.total_flops for launch in decoder_chunk(w.model, w.shape, is_first=False))
    for ranks, more in ((2, 0.02), (4, 0.04), (6, 0.06)):
        launches, _ = decoder_share(w.model, w.shape, ranks, is_first=False)
        mine = ranks * sum(launch.total_flops for launch in launches)
        assert whole < mine < (1 + more) * whole


@pytest.mark.slow
def test_bytes_of_strips_are_what_was_worked_out_by_hand() -> None:
    """Of two ranks, each gives the other a row of every convolution's input: past frames and new ones, by width and
    channels."""
    latent = 104 * (3 * 16 + (4 + 6) * 3 * 384 + 2 * 384)
    doubled = 208 * (4 * (192 + 5 * 384) + 4 * 384)
    quadrupled = 416 * (6 * 6 * 192 + 4 * 192)
    full = 832 * 7 * 6 * 96
    keys_values = 2 * 30 * 104 * 384
    pixels = 3 * 4 * 240 * 832
    w = fused(SMALL)
    _, found = decoder_share(w.model, w.shape, 2, is_first=False)
    assert found == 2 * (latent + doubled + quadrupled + full + keys_values) + pixels
    # Of four, those in the middle have two neighbours, and get the keys and values of 45 rows.
    _, found = decoder_share(w.model, w.shape, 4, is_first=False)
    assert found == 2 * (2 * (latent + doubled + quadrupled + full) + 2 * 45 * 104 * 384) + 3 * pixels // 2


@pytest.mark.parametrize(("counts", "busiest"), [([3], 0), ([2, 3], 1), ([3, 3, 3], 1), ([4, 3, 3, 4], 0)])
def test_the_busiest_rank_has_most_rows_and_neighbours(counts: list[int], busiest: int) -> None:
    assert busiest_rank(counts) == busiest


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
