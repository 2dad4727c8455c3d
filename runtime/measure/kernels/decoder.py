"""The kernels of the VAE's decoder, between its convolutions and those in int8: what is timed, and what is checked
before."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from wanforge.configs.clip import TEMPORAL_STRIDE
from wanforge.configs.model import VAEConfig
from wanforge.plugins.channel_norm import PAST
from wanforge.plugins.channel_norm.fused import History, Stream, normed, summed
from wanforge.plugins.channel_norm.reference import channel_norm, unfolded
from wanforge.plugins.int8_convolution import FULL_SCALE, TAPS, WIDTH
from wanforge.plugins.int8_convolution.fused import ConvolutionWeight, convolve, taps_last
from wanforge.plugins.int8_convolution.reference import int8_convolution
from wanforge.runtime.measure.cost.launches import BF16, FP32, INT8, LaunchCost, Workload
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


def int8_convolution_cases(w: Workload) -> list[Case]:
    """The convolution at full resolution that is added to the stream, and PyTorch's in the compute type."""
    channels, size = w.model.vae.dim, (w.shape.height_px, w.shape.width_px, w.model.vae.dim)

    def inputs(draw: Draw) -> tuple[Tensor, ...]:
        x, weight = (steps(draw(*shape)) for shape in ((PAST + TEMPORAL_STRIDE, *size), (channels, TAPS * channels)))
        return x, weight, draw.float32(channels), draw.float32(channels), draw(TEMPORAL_STRIDE, *size)

    def kernel(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor) -> None:
        convolve(x, ConvolutionWeight(weight, scale, bias), residual.dtype, residual)

    def library(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        # What is timed is a convolution of as many values, which the conversion before it adds to.
        taps = weight.view(channels, WIDTH, WIDTH, WIDTH, channels).movedim(-1, 1)
        wide, taps, bias = (each.to(residual.dtype) for each in (x[None].movedim(-1, 1), taps, bias))
        return F.conv3d(wide, taps, bias, padding=(0, 1, 1))[0].movedim(0, -1) + residual

    values, matrix = w.shape.height_px * w.shape.width_px * channels, TAPS * channels**2
    read = (PAST + TEMPORAL_STRIDE) * INT8 * values + INT8 * matrix + 2 * FP32 * channels
    flops = {"int8": 2 * TEMPORAL_STRIDE * values * TAPS * channels}
    moved = TEMPORAL_STRIDE * BF16 * values
    cost = LaunchCost("int8 convolution", flops, read + moved, moved)
    return [Case(cost.name, [cost], inputs, kernel, {"PyTorch, not in int8": library})]


def int8_convolution_claims(draw: Draw, size: CheckedSize, limit: float) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Claims about frames with as many positions as there are tokens.

    Args:
        limit: The largest error of a value that is rounded twice.
    """
    frames, rows, columns = size.grid
    channels = VAEConfig().dim
    x, weight = steps(draw(PAST + frames, rows, columns, channels)), steps(draw(channels, channels, *3 * (WIDTH,)))
    scale, bias, residual = (
        draw.float32(channels, size=1e-4),
        draw.float32(channels),
        draw(frames, rows, columns, channels),
    )
    given = ConvolutionWeight(taps_last(weight), scale, bias)
    expected = int8_convolution(x[None].movedim(-1, 1), weight, scale, bias)[0].movedim(0, -1).to(draw.dtype)
    yield "convolution", convolve(x, given, draw.dtype), expected, limit
    yield "with a residual", convolve(x, given, draw.dtype, residual), expected + residual, limit


def steps(x: Tensor) -> Tensor:
    """Values as steps of int8, most of which are used."""
    return (40 * x).clamp(-FULL_SCALE, FULL_SCALE).to(torch.int8)


def activated(x_THWC: Tensor, weight_C: Tensor) -> Tensor:
    """The definition, for channels that lie last."""
    return F.silu(channel_norm(x_THWC.flatten(0, 2), weight_C)).view(x_THWC.shape)
