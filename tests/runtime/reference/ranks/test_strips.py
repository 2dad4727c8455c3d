"""Strips of pictures go through the VAE as whole pictures do, or are refused."""

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_matches
from tests.ranks import ROWS_OF_LATENTS, on_threads, random_vae, through_vae
from wanforge.errors import ShapeError
from wanforge.runtime.reference.ranks.exchange import Alone, Exchange
from wanforge.runtime.reference.ranks.strips import Strip, row_counts

TOLERANCE = 3e-6
"""Only the order of sums may differ between convolutions of whole pictures and of some of their rows."""


@pytest.mark.slow
def test_ranks_make_the_latents_and_pixels_of_the_whole() -> None:
    vae = random_vae(8)
    whole = through_vae(vae)
    for ranks in (1, 2, 4, ROWS_OF_LATENTS):
        first, *others = on_threads(ranks, lambda exchange: through_vae(vae, exchange))
        for name, expected in whole.items():
            assert_matches(first[name], expected, TOLERANCE, name=f"{name}, {ranks} ranks")
        assert all(torch.equal(each["latents"], first["latents"]) for each in others)


@pytest.mark.slow
def test_one_rank_alone_computes_the_whole() -> None:
    vae = random_vae(8)
    latent, strip = torch.randn(1, 16, 1, 3, 2, generator=torch.Generator().manual_seed(1)), Strip(Alone(), 3)
    (expected, kept), (found, caches) = vae.decode_first(latent), vae.decode_first(latent, strip)
    assert all(torch.equal(*each) for each in zip((expected, *kept), (found, *caches), strict=True))


@pytest.mark.parametrize("rows", [7, 60, 90])
@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_strips_are_of_almost_equal_height(rows: int, ranks: int) -> None:
    counts = row_counts(rows, ranks)
    assert sum(counts) == rows
    assert max(counts) - min(counts) <= 1


def test_ranks_without_rows_are_refused() -> None:
    assert row_counts(3, 3) == [1, 1, 1]
    with pytest.raises(ShapeError, match=r"32 rows.* 4 of the latents.*among 5 GPUs; use 4 GPUs at most"):
        row_counts(4, 5)


def test_rows_next_to_a_strip_are_the_neighbours_or_zeros() -> None:
    x_HW = torch.arange(1.0, 11).view(5, 2)

    def bordered(exchange: Exchange) -> tuple[Tensor, ...]:
        strip = Strip(exchange, 5)
        own = x_HW[strip.own]
        above, below = strip.borders(own, 0)
        assert torch.equal(strip.gathered(own, 0), x_HW)
        assert torch.equal(strip.from_first(x_HW), own)
        assert torch.equal(strip.to_first(own, 0), x_HW if exchange.rank == 0 else x_HW[:0])
        return above, own, below

    rows = [torch.cat(each)[:, 0].tolist() for each in on_threads(3, bordered)]
    assert rows == [[0, 1, 3], [1, 3, 5, 7], [5, 7, 9, 0]]
