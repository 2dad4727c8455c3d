"""Which tokens and which heads each rank has, and how hidden states go from one division to the other.

The method is called Ulysses. A rank has a run of tokens in everything that treats tokens one by one: linears, norms,
residuals and attention to the text. Self-attention treats heads one by one instead, so before it the ranks exchange
what they have: each gives away the heads that are not its own and gets the tokens that it lacks. After it they
exchange the other way round.

Letters: as in `dit`; O tokens of this rank, G heads of this rank, H all heads, K channels of a head (128).

Source: Jacobs et al. 2023, DeepSpeed Ulysses (arXiv:2309.14509).
"""

from itertools import accumulate

import torch
from torch import Tensor

from wanforge.errors import ConfigError, ShapeError
from wanforge.runtime.reference.ranks.exchange import Exchange


def divisors(heads: int) -> list[int]:
    """The numbers of ranks, from two on, that this many heads can be divided among."""
    return [ranks for ranks in range(2, heads + 1) if heads % ranks == 0]


def check_heads(heads: int, ranks: int) -> None:
    """Refuse to divide heads among ranks if some would have more than others.

    Raises:
        ConfigError: The number of heads is not a multiple of `ranks`.
    """
    if ranks < 1 or heads % ranks:
        raise ConfigError(
            f"{heads} heads cannot be divided evenly among {ranks} GPUs; use "
            f"{', '.join(map(str, divisors(heads)))} GPUs or one"
        )


def token_counts(tokens: int, ranks: int, rows_per_scale: int) -> list[int]:
    """How many tokens each rank has, in order.

    Tokens whose activations share a scale stay together, so that each is rounded as without division. The numbers of
    such groups differ by one at most, and the last group may be ragged.

    Args:
        rows_per_scale: Tokens that share a scale in the linears; see `Recipe.rows_per_scale`.

    Raises:
        ShapeError: A rank would have no tokens.
    """
    groups = -(-tokens // rows_per_scale)
    if groups < ranks:
        raise ShapeError(
            f"a clip of {tokens} tokens cannot be divided among {ranks} GPUs, because {rows_per_scale} tokens share a "
            f"scale; use {groups} GPUs at most, or a longer or larger clip"
        )
    ends = [min(tokens, (rank + 1) * groups // ranks * rows_per_scale) for rank in range(ranks)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


class Division:
    """How one clip is divided among the ranks, as one of them sees it.

    Attributes:
        counts: How many tokens each rank has.
        tokens: All tokens of the clip.
        own: The tokens of this rank, as a slice of all.
        own_heads: How many heads this rank has.

    Args:
        heads: All heads of the denoiser.
        rows_per_scale: Tokens that stay together; see `token_counts`.

    Raises:
        ConfigError: The heads cannot be divided evenly.
        ShapeError: A rank would have no tokens.
    """

    def __init__(self, exchange: Exchange, tokens: int, heads: int, rows_per_scale: int) -> None:
        check_heads(heads, exchange.ranks)
        self.exchange, self.tokens, self.own_heads = exchange, tokens, heads // exchange.ranks
        self.counts = token_counts(tokens, exchange.ranks, rows_per_scale)
        ends = [0, *accumulate(self.counts)]
        self.own = slice(ends[exchange.rank], ends[exchange.rank + 1])

    def to_heads(self, q_BOHK: Tensor, k_BOHK: Tensor, v_BOHK: Tensor) -> Tensor:
        """Queries, keys and values of this rank's tokens and all heads as those of all tokens and this rank's heads.

        Returns:
            The three in one tensor ``[3, B, L, G, K]``, in their type.
        """
        x_3BOHK = torch.stack((q_BOHK, k_BOHK, v_BOHK))
        _, batch, _, _, channels = x_3BOHK.shape
        shapes = [(3, batch, count, self.own_heads, channels) for count in self.counts]
        received = self.exchange.swap(x_3BOHK.split(self.own_heads, 3), shapes)
        return torch.cat(received, 2)

    def to_tokens(self, y_BLGK: Tensor) -> Tensor:
        """What attention computed of all tokens and this rank's heads as that of this rank's tokens and all heads.

        Returns:
            ``[B, O, H, K]`` in the type of `y`.
        """
        pieces = y_BLGK.split(self.counts, 1)
        shape = pieces[self.exchange.rank].shape
        return torch.cat(self.exchange.swap(pieces, [tuple(shape)] * self.exchange.ranks), 2)

    def to_all(self, x_BOC: Tensor) -> Tensor:
        """Give every rank the values of all tokens, ``[B, L, C]``."""
        shapes = [(len(x_BOC), count, x_BOC.shape[-1]) for count in self.counts]
        return torch.cat(self.exchange.swap([x_BOC] * self.exchange.ranks, shapes), 1)
