"""What one step of the denoiser takes on several GPUs, predicted: the launches of one of them, and its exchange.

A rank's launches are those of `fused`, with its tokens or its heads; see `runtime.reference.ranks`. Nothing is fused to
the exchange, so attention does not quantise, and what is sent is copied into one piece of memory, and out of one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from wanforge.configs.model import HEAD_DIM
from wanforge.configs.targets import Target
from wanforge.runtime.measure.cost.fused import ScaledLaunches, SidePathLaunches, TileLaunches, fused_block
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
from wanforge.runtime.reference.ranks.shares import check_heads, token_counts

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
class RankStep:
    """Predicted seconds of one step on one of several GPUs.

    Attributes:
        computing: The launches, those that copy what is exchanged among them.
        exchanging: The exchange, during which nothing is computed.
    """

    computing: float
    exchanging: float

    @property
    def seconds(self) -> float:
        return self.computing + self.exchanging


def predicted_step(w: Workload, ranks: int, target: Target, link_gbs: float) -> RankStep:
    """One step on the GPU that has the most tokens.

    Args:
        ranks: The number of GPUs.
        link_gbs: The peak rate at which a GPU sends to the others while it receives as much, in GB/s.

    Raises:
        ConfigError: The heads cannot be divided evenly.
        ShapeError: A rank would have no tokens.
    """
    exchanging = exchanged_bytes(w, ranks) / (link_gbs * 1e9 * LINK_SHARE)
    return RankStep(predicted_seconds(step_share(w, ranks), target), exchanging)


def most_tokens(w: Workload, ranks: int) -> int:
    """The most tokens that a rank has."""
    check_heads(w.H, ranks)
    return max(token_counts(w.L, ranks, w.recipe.rows_per_scale))


def block_share(w: Workload, ranks: int) -> BlockLaunches:
    """One block on the rank that has the most tokens."""
    by_tokens, by_heads = share(w, most_tokens(w, ranks), w.H), share(w, w.L, w.H // ranks)
    linears = ScaledLaunches(by_tokens) if w.recipe.linear == "fp8-row" else TileLaunches(by_tokens)
    own = fused_block(by_heads)
    return {
        **fused_block(by_tokens),
        "keys and values": _at_width(own["keys and values"], w.D),
        "selection": _at_width(own["selection"], w.D),
        "attention": [
            *_copies("exchange q, k, v", 3 * by_tokens.stream, 3 * by_heads.stream),
            *_at_width(SidePathLaunches(by_heads).attention(), w.D),
            *_copies("exchange attention", by_heads.stream, by_tokens.stream),
            *linears.pack(),
        ],
    }


def step_share(w: Workload, ranks: int) -> list[LaunchCost]:
    """The launches of one step on the rank that has the most tokens, once the prompt's keys and values exist. One GPU
    alone exchanges nothing; see `fused.fused_step`."""
    mine = share(w, most_tokens(w, ranks), w.H)
    return [*time(w), *stem(mine), *all_launches(block_share(w, ranks)) * w.model.dit.num_layers, *head(mine)]


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


def _copies(name: str, given: int, received: int) -> list[LaunchCost]:
    return [sweep(f"{name}: pack", given, BF16, BF16), sweep(f"{name}: unpack", received, BF16, BF16)]


def _at_width(launches: Iterable[LaunchCost], width: int) -> list[LaunchCost]:
    """Launches for some of the heads of a model of this width, whose kernels do not depend on how many they are."""
    return [each if each.run is None else replace(each, run=replace(each.run, width=width)) for each in launches]
