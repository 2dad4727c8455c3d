"""The input of a convolution of the VAE as a kernel. Frames lie with their channels last.

Letters: T frames, P frames of the past, H W rows and columns, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.channel_norm import PAST
from wanforge.plugins.launching.call import Kernel

JOIN = Kernel(
    "channel_norm",
    "join",
    ("cdiv(N, BLOCK // LANES)", "max(T, PAST)"),
    {"N": "i32", "T": "i32", "width": "i32"},
)


class Stream(NamedTuple):
    """The residual stream of some frames.

    Attributes:
        x: ``[T, H, W, C]``; or ``[T, H / 2 + 1, W / 2 + 1, 4, C]``, what a convolution with a folded weight gave, see
            `reference.unfolded`.
        branch_THWC: What is still to be added to it.
    """

    x: Tensor
    branch_THWC: Tensor | None = None

    @property
    def is_folded(self) -> bool:
        return self.x.ndim == 5

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """T, H, W, C."""
        if not self.is_folded:
            frames, height, width, channels = self.x.shape
            return frames, height, width, channels
        frames, height, width, _, channels = self.x.shape
        return frames, 2 * height - 2, 2 * width - 2, channels


class History(NamedTuple):
    """The frames before the first one, zeros if they are None, and what receives those before the next chunk."""

    past_PHWC: Tensor | None
    kept_PHWC: Tensor


def normed(
    stream: Stream,
    weight_C: Tensor,
    history: History | None = None,
    *,
    steps_C: Tensor | None = None,
    activates: bool = True,
    keeps_sum: bool = True,
) -> tuple[Tensor, Stream]:
    """`reference.channel_norm` of the stream, followed by SiLU if `activates`, after the frames of the past.

    Args:
        history: Frames in the type of the result.
        steps_C: How many steps a difference of one is in each channel, if the result is to be rounded to steps of int8;
            see `int8_convolution.reference.steps_per_unit`.
        keeps_sum: Whether the stream is needed after this.

    Returns:
        The input of the next convolution, ``[P + T, H, W, C]``, and the stream, without a branch if it is needed.
    """
    total = _blank(stream, 0) if keeps_sum and stream.branch_THWC is not None else None
    joined = _blank(stream, 0 if history is None else PAST, None if steps_C is None else torch.int8)
    _join(stream, weight_C, history, total, joined, steps_C=steps_C, activates=activates)
    return joined, stream if total is None else Stream(total)


def joined(stream: Stream, history: History) -> Tensor:
    """The stream itself, after the frames of the past: ``[P + T, H, W, C]``."""
    out = _blank(stream, PAST)
    _join(stream, None, history, None, out)
    return out


def summed(stream: Stream) -> Tensor:
    """The stream as one tensor ``[T, H, W, C]``."""
    if stream.branch_THWC is None and not stream.is_folded:
        return stream.x
    out = _blank(stream, 0)
    _join(stream, None, None, None, out)
    return out


def forget(history: History) -> None:
    """Let the next chunk see zeros before its first frame."""
    nothing = Stream(history.kept_PHWC[:0])
    _join(nothing, None, history, None, None)


def _blank(stream: Stream, more: int, dtype: torch.dtype | None = None) -> Tensor:
    frames, *others = stream.shape
    return torch.empty((frames + more, *others), dtype=dtype or stream.x.dtype, device=stream.x.device)


def _join(
    stream: Stream,
    weight_C: Tensor | None,
    history: History | None,
    total: Tensor | None,
    joined: Tensor | None,
    *,
    steps_C: Tensor | None = None,
    activates: bool = False,
) -> None:
    frames, height, width, channels = stream.shape
    past, kept = history or (None, None)
    shapes = {
        "branch": (stream.branch_THWC, (frames, height, width, channels)),
        "past": (past, (PAST, height, width, channels)),
        "kept": (kept, (PAST, height, width, channels)),
        "weight": (weight_C, (channels,)),
        "steps": (steps_C, (channels,)),
    }
    for name, (tensor, expected) in shapes.items():
        if tensor is not None and (tensor.shape != expected or not tensor.is_contiguous()):
            raise ShapeError(
                f"{name} {tuple(tensor.shape)}, strides {tensor.stride()}, does not fit frames {stream.shape}; "
                f"expected {expected}, channels last"
            )
    if not stream.x.is_contiguous():
        raise ShapeError(f"x {tuple(stream.x.shape)}, strides {stream.x.stride()}, must lie with its channels last")
    JOIN(
        x=stream.x,
        branch=stream.branch_THWC,
        weight=weight_C,
        steps=steps_C,
        past=past,
        total=total,
        joined=joined,
        kept=kept,
        N=height * width,
        T=frames,
        width=width,
        C=channels,
        LANES=1 << (channels - 1).bit_length(),
        PAST=0 if history is None else PAST,
        ACTIVATES=activates,
        FOLDED=stream.is_folded,
    )
