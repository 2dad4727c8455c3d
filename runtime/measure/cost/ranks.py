"""What a request takes on several GPUs, predicted: the launches of one of them, and its exchange.

In the denoiser, a rank's launches are those of `fused`, with its tokens or its heads; see `runtime.reference.ranks`.
Nothing is fused to the exchange, so attention does not quantise, and what is sent is copied into one piece of memory,
and out of one. In the decoder they are those of `decoder`, with its rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from wanforge.configs.clip import SPATIAL_STRIDE, TEMPORAL_STRIDE, ClipShape
from wanforge.configs.model import HEAD_DIM, ModelConfig
from wanforge.configs.targets import Target
from wanforge.plugins.launching.launch import INTERPRETED_SM
from wanforge.runtime.backends.decoder.recorded import recorded
from wanforge.runtime.measure.cost.decoder import chunk_costs
from wanforge.runtime.measure.cost.fused import (
    SidePathLaunches,
    fused_block,
    launches_around,
    launches_within,
)
from wanforge.runtime.measure.cost.launches import (
    BF16,
    FP32,
    BlockLaunches,
    LaunchCost,
    Workload,
    all_launches,
    sweep,
)
from wanforge.runtime.measure.cost.prediction import predicted_seconds
from wanforge.runtime.measure.cost.unfused import head, stem, time
from wanforge.runtime.reference.ranks.exchange import ProcessGroup
from wanforge.runtime.reference.ranks.shares import check_heads, token_counts
from wanforge.runtime.reference.ranks.strips import Strip, row_counts

LINK_SHARE = 0.8
"""The share of the peak rate of a link that an exchange is assumed to reach, as for copies from the host."""


@dataclass(frozen=True)
class WorkloadShare(Workload):
    """A part of a workload: some of its tokens and some of its heads.

    Attributes:
        tokens, heads: How many.
    """

    tokens: int = 0
    heads: int = 0

    @property
    def L(self) -> int:
        return self.tokens

    @property
    def D(self) -> int:
        return self.heads * HEAD_DIM

    @property
    def H(self) -> int:
        return self.heads


@dataclass(frozen=True)
class RankTime:
    """Predicted seconds on one of several GPUs.

    Attributes:
        computing: The launches, those that copy what is exchanged among them.
        exchanging: The exchange, during which nothing is computed.
    """

    computing: float
    exchanging: float

    @property
    def seconds(self) -> float:
        return self.computing + self.exchanging


def predicted_step(w: Workload, ranks: int, target: Target, link_gbs: float) -> RankTime:
    """One step on the GPU that has the most tokens.

    Args:
        ranks: The number of GPUs.
        link_gbs: The peak rate at which a GPU sends to the others while it receives as much, in GB/s.

    Raises:
        ConfigError: The heads cannot be divided evenly.
        ShapeError: A rank would have no tokens.
    """
    exchanging = exchanged_bytes(w, ranks) / (link_gbs * 1e9 * LINK_SHARE)
    return RankTime(predicted_seconds(step_share(w, ranks), target), exchanging)


def most_tokens(w: Workload, ranks: int) -> int:
    """The most tokens that a rank has."""
    check_heads(w.H, ranks)
    return max(token_counts(w.L, ranks, w.recipe.rows_per_scale))


def block_share(w: Workload, ranks: int) -> BlockLaunches:
    """One block on the rank that has the most tokens."""
    by_tokens, by_heads = share(w, most_tokens(w, ranks), w.H), share(w, w.L, w.H // ranks)
    own = fused_block(by_heads)
    return {
        **fused_block(by_tokens),
        "keys and values": _at_width(own["keys and values"], w.D),
        "selection": _at_width(own["selection"], w.D),
        "attention": [
            *_copies("exchange q, k, v", 3 * by_tokens.stream, 3 * by_heads.stream),
            *_at_width(SidePathLaunches(by_heads).attention(), w.D),
            *_copies("exchange attention", by_heads.stream, by_tokens.stream),
            *launches_within(by_tokens).pack(),
        ],
    }


def step_share(w: Workload, ranks: int) -> list[LaunchCost]:
    """The launches of one step on the rank that has the most tokens, once the prompt's keys and values exist. One GPU
    alone exchanges nothing; see `fused.fused_step`."""
    mine = share(w, most_tokens(w, ranks), w.H)
    begin = [*time(w), *stem(mine), *launches_around(mine).first_moments()]
    return [*begin, *all_launches(block_share(w, ranks)) * w.model.dit.num_layers, *head(mine)]


def share(w: Workload, tokens: int, heads: int) -> WorkloadShare:
    """A workload at some of its tokens and some of its heads."""
    return WorkloadShare(w.model, w.shape, w.recipe, w.num_selected, w.text_rows, tokens=tokens, heads=heads)


def exchanged_bytes(w: Workload, ranks: int) -> int:
    """Bytes that the rank with the most tokens sends to others, or receives if that is more, in one step."""
    tokens = most_tokens(w, ranks)
    sent, received = tokens * (w.H - w.H // ranks), (w.L - tokens) * (w.H // ranks)
    layer = 4 * BF16 * max(sent, received) * HEAD_DIM
    velocity = FP32 * 4 * w.model.dit.out_channels * max(tokens * (ranks - 1), w.L - tokens)
    return w.model.dit.num_layers * layer + velocity


class SilentExchange(ProcessGroup):
    """The exchange of a rank on the meta device, which says nothing to the others.

    Attributes:
        sent, received: Bytes of tensors on the meta device that would have been exchanged with other ranks.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__(rank, ranks)
        self.sent = self.received = 0

    def swap(self, pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        found = super().swap(pieces, shapes)
        self.sent += sum(piece.nbytes for piece in pieces) - pieces[self.rank].nbytes
        self.received += sum(each.nbytes for each in found) - found[self.rank].nbytes
        return found


def predicted_decoding(model: ModelConfig, shape: ClipShape, ranks: int, target: Target, link_gbs: float) -> RankTime:
    """The frames of a clip on the GPU that has the most rows, until the first has all pixels; see `predicted_step`.

    Raises:
        ShapeError: A rank would have no rows.
    """
    (first, bytes_first), (later, bytes_later) = (
        decoder_share(model, shape, ranks, is_first=is_first) for is_first in (True, False)
    )
    more = shape.latent_frames - 1
    seconds = predicted_seconds(first, target) + more * predicted_seconds(later, target)
    return RankTime(seconds, (bytes_first + more * bytes_later) / (link_gbs * 1e9 * LINK_SHARE))


@lru_cache(maxsize=64)  # see `decoder.decoder_chunk`
def decoder_share(
    model: ModelConfig, shape: ClipShape, ranks: int, *, is_first: bool
) -> tuple[tuple[LaunchCost, ...], int]:
    """The launches by which the busiest rank decodes one latent frame, and the bytes that it sends to others, or
    receives if that is more, together with those of the pixels that the first rank receives after that."""
    counts = row_counts(shape.latent_height, ranks)
    exchange = SilentExchange(busiest_rank(counts), ranks)
    chunk = recorded(model, INTERPRETED_SM, shape, is_first=is_first, strip=Strip(exchange, shape.latent_height))
    moved = max(exchange.sent, exchange.received)
    frames = 1 if is_first else TEMPORAL_STRIDE
    pixels = 3 * frames * (shape.latent_height - counts[0]) * SPATIAL_STRIDE * shape.width_px
    return chunk_costs(chunk, model), moved + pixels


def busiest_rank(counts: Sequence[int]) -> int:
    """The rank with the most rows, and with neighbours on both sides if one of those has."""
    last = len(counts) - 1
    return max(range(len(counts)), key=lambda rank: (counts[rank], 0 < rank < last))


def _copies(name: str, given: int, received: int) -> list[LaunchCost]:
    return [sweep(f"{name}: pack", given, BF16, BF16), sweep(f"{name}: unpack", received, BF16, BF16)]


def _at_width(launches: Iterable[LaunchCost], width: int) -> list[LaunchCost]:
    """Launches for some of the heads of a model of this width, whose kernels do not depend on how many they are."""
    return [each if each.run is None else replace(each, run=replace(each.run, width=width)) for each in launches]
