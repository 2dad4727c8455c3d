"""The kernel between the convolutions of the VAE's decoder: what is timed, and what is checked before."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from wanforge.configs.clip import TEMPORAL_STRIDE
from wanforge.configs.model import VAEConfig
from wanforge.plugins.channel_norm import PAST
from wanforge.plugins.channel_norm.fused import History, Stream, normed, summed
from wanforge.plugins.channel_norm.reference import channel_norm, unfolded
from wanforge.runtime.measure.cost.launches import BF16, FP32, LaunchCost, Workload
from wanforge.runtime.measure.kernels.pieces import CheckedSize
from wanforge.runtime.measure.kernels.timing import Case, Draw, eager_and_compiled


def channel_norm_cases(w: Workload) -> list[Case]:
    """The norm at full resolution, where most of them are, with a branch that is added to the stream."""
    channels, frame = w.model.vae.dim, (w.shape.height_px, w.shape.width_px, w.model.vae.dim)

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        new = (draw(TEMPORAL_STRIDE, *frame) for _ in range(2))
        return *new, draw.float32(channels), draw(PAST, *frame), torch.empty_like(draw(PAST, *frame))

    def kernel(x: Tensor, branch: Tensor, weight_C: Tensor, past: Tensor, kept: Tensor) -> None:
        normed(Stream(x, branch), weight_C, History(past, kept))

    def reference(x: Tensor, branch: Tensor, weight_C: Tensor, past: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        total = x + branch
        return torch.cat((past, activated(total, weight_C))), total

    values = w.shape.height_px * w.shape.width_px * channels
    read, written = 2 * TEMPORAL_STRIDE + PAST, 2 * TEMPORAL_STRIDE + 2 * PAST
    cost = LaunchCost("channel norm", {}, read * BF16 * values + FP32 * channels, written * BF16 * values)
    return [Case(cost.name, [cost], inputs, kernel, eager_and_compiled(reference))]


def channel_norm_claims(draw: Draw, size: CheckedSize, limit: float) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Claims about frames with two positions for each token of a row and of a column.

    Args:
        limit: The largest error of a value that is rounded twice.
    """
    frames, rows, columns = size.grid
    shape = (frames, 2 * rows, 2 * columns, VAEConfig().dim)
    weight_C, branch, past = draw.float32(shape[3]), draw(*shape), draw(PAST, *shape[1:])
    folded = draw(frames, rows + 1, columns + 1, 4, shape[3])
    for name, x, whole in (
        ("plain", branch.flip(0), branch.flip(0)),
        ("folded", folded, unfolded(folded.flatten(3).movedim(-1, 1)).movedim(1, -1)),
    ):
        history = History(past, torch.empty_like(past))
        found, after = normed(Stream(x, branch), weight_C, history)
        yield f"{name}, sum", summed(after), whole + branch, 0
        yield f"{name}, norm", found[PAST:], activated(whole + branch, weight_C), limit
        yield f"{name}, past", found[:PAST], past, 0
        yield f"{name}, kept", history.kept_PHWC, found[-PAST:].clone(), 0


def activated(x_THWC: Tensor, weight_C: Tensor) -> Tensor:
    """The definition, for channels that lie last."""
    return F.silu(channel_norm(x_THWC.flatten(0, 2), weight_C)).view(x_THWC.shape)
