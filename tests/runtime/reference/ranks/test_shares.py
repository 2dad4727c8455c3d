"""Tokens and heads are divided as the linears and attention need it, or the division is refused."""

import pytest
import torch
from torch import Tensor

from tests.ranks import TILES, on_threads, random_dit
from wanforge.configs.model import load_model
from wanforge.errors import ConfigError, ShapeError
from wanforge.runtime.reference.dit import Block
from wanforge.runtime.reference.ranks.exchange import Exchange
from wanforge.runtime.reference.ranks.shares import Division, check_heads, divisors, token_counts


@pytest.mark.parametrize(
    ("model", "ranks"),
    [("turbowan2.1-t2v-1.3b-480p", [2, 3, 4, 6, 12]), ("turbowan2.1-t2v-14b-720p", [2, 4, 5, 8, 10, 20, 40])],
)
def test_heads_of_published_models_can_be_divided_among_these_gpus(model: str, ranks: list[int]) -> None:
    assert divisors(load_model(model).dit.num_heads) == ranks


@pytest.mark.parametrize("ranks", [0, 5, 24])
def test_heads_that_cannot_be_divided_evenly_are_refused(ranks: int) -> None:
    check_heads(12, 1)
    with pytest.raises(ConfigError, match=rf"12 heads .* among {ranks} GPUs; use 2, 3, 4, 6, 12 GPUs or one"):
        check_heads(12, ranks)


@pytest.mark.parametrize("tokens", [257, 384, 585, 32760])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 128])
def test_shares_are_whole_groups_of_almost_equal_number(tokens: int, ranks: int, rows: int) -> None:
    counts = token_counts(tokens, ranks, rows)
    assert sum(counts) == tokens
    assert not any(count % rows for count in counts[:-1])
    groups = [-(-count // rows) for count in counts]
    assert max(groups) - min(groups) <= 1


def test_ranks_without_tokens_are_refused() -> None:
    assert token_counts(257, 3, 128) == [128, 128, 1]
    with pytest.raises(ShapeError, match=r"257 tokens cannot be divided among 4 GPUs.*use 3 GPUs at most"):
        token_counts(257, 4, 128)


def test_heads_and_tokens_go_there_and_back() -> None:
    x_BLHK = torch.arange(5 * 6 * 2).view(1, 5, 6, 2)

    def there_and_back(exchange: Exchange) -> None:
        division = Division(exchange, 5, 6, 1)
        given = x_BLHK[:, division.own]
        q, k, v = division.to_heads(given, given + 100, given + 200)
        mine = x_BLHK[:, :, 2 * exchange.rank : 2 * exchange.rank + 2]
        assert torch.equal(q, mine)
        assert torch.equal(k, mine + 100)
        assert torch.equal(v, mine + 200)
        assert torch.equal(division.to_tokens(v), given + 200)
        assert torch.equal(division.to_all(given.flatten(2)), x_BLHK.flatten(2))

    on_threads(3, there_and_back)


def projected(x_BLD: Tensor, counts: list[int]) -> Tensor:
    """Queries, keys and values of tokens that are divided like this, one part after the other."""
    block = random_dit(TILES).blocks[0]
    assert isinstance(block, Block)
    return torch.cat([torch.stack(block.self_attn.project(part)) for part in x_BLD.split(counts, 1)], 2)


def test_linears_of_whole_tiles_are_bit_equal_to_those_of_all_tokens() -> None:
    x_BLD = torch.randn(1, 300, 512, generator=torch.Generator().manual_seed(3))
    whole = projected(x_BLD, [300])
    assert torch.equal(projected(x_BLD, token_counts(300, 2, 128)), whole)
    assert not torch.equal(projected(x_BLD, token_counts(300, 2, 1)), whole)
