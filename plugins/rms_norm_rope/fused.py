"""RMS norm over all heads and the rotary embedding as one in-place kernel."""

from collections.abc import Sequence

from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import Kernel

NORM = Kernel("rms_norm_rope", "norm", ("cdiv(M, ROWS)", "TENSORS"), {"M": "i32", "x_stride": "i32:16", "eps": "fp32"})


def rms_norm_rotate(
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    eps: float,
    angles: tuple[Tensor, Tensor] | None = None,
    plain_LD: Tensor | None = None,
) -> None:
    """Apply `reference.rms_norm` and, if angles are given, `reference.rotate` to one or two tensors in place.

    Args:
        tensors: ``[L, H * 128]``, equal in shape and strides; rows may be strided.
        weights: ``[H * 128]`` each.
        angles: Cosines and sines, float32 ``[L, 64]``.
        plain_LD: Receives the second tensor as it is before it is rotated, ``[L, H * 128]``, contiguous.
    """
    first = tensors[0]
    rows, width = first.shape
    for x, weight in zip(tensors, weights, strict=True):
        if x.shape != first.shape or x.stride() != first.stride() or x.stride(1) != 1 or weight.shape != (width,):
            raise ShapeError(f"x {tuple(x.shape)}, strides {x.stride()}, and weight {tuple(weight.shape)} do not fit")
    if width % 128 or (angles and any(a.shape != (rows, 64) for a in angles)):
        raise ShapeError(f"x {tuple(first.shape)} must have heads of 128 channels, and one row of 64 angles per token")
    if plain_LD is not None and not (plain_LD.shape == first.shape and plain_LD.is_contiguous() and len(tensors) == 2):
        raise ShapeError(f"x before its rotation needs a contiguous tensor of its shape; found {tuple(plain_LD.shape)}")
    cos, sin = angles or (None, None)
    second, second_weight = (tensors[1], weights[1]) if len(tensors) == 2 else (None, None)
    NORM(
        x_0=first,
        x_1=second,
        weight_0=weights[0],
        weight_1=second_weight,
        cos=cos,
        sin=sin,
        plain_1=plain_LD,
        M=rows,
        x_stride=first.stride(0),
        eps=eps,
        D=width,
        TENSORS=len(tensors),
    )
