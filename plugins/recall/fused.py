"""Reading remembered keys and values as one kernel."""

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.recall import GROUP
from wanforge.plugins.recall.reference import HEAD, KeptRows

RECALL = Kernel("recall", "recall", ("cdiv(P, ROWS)",), {"P": "i32"})


def recall_into(out: tuple[Tensor, Tensor], kept: KeptRows, places_P: Tensor, angles: tuple[Tensor, Tensor]) -> None:
    """Write what `reference.recall` computes. Where there is no token, nothing is written.

    Args:
        out: Receive keys and values, ``[P, D]``, contiguous.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    keys_PD, values_PD = out
    tokens, width = keys_PD.shape
    rows = len(kept.keys)
    fits = (
        kept.keys.shape == kept.values.shape == (rows, width)
        and values_PD.shape == keys_PD.shape
        and (kept.key_scale is None) == (kept.value_scale is None)
        and (kept.key_scale is None or rows % GROUP == 0)
        and places_P.shape == (tokens,)
        and all(angle.shape == (tokens, HEAD // 2) for angle in angles)
        and (kept.key_scale is None or kept.key_scale.shape == (rows // GROUP, width))
        and (kept.value_scale is None or kept.value_scale.shape == (rows, width // GROUP))
    )
    if not fits or width % HEAD:
        raise ShapeError(
            f"keys {tuple(kept.keys.shape)}, values {tuple(kept.values.shape)}, scales, {len(places_P)} places and "
            f"angles do not fit results of {tuple(keys_PD.shape)}, which must have heads of {HEAD} channels"
        )
    given = [x for x in (*out, *kept, places_P, *angles) if x is not None]
    if not all(x.is_contiguous() for x in given):
        raise ShapeError("remembered keys and values, their scales, places and angles must be contiguous")
    types = kept.keys.dtype == kept.values.dtype, keys_PD.dtype == values_PD.dtype, places_P.dtype == torch.int32
    if not all(types) or any(angle.dtype != torch.float32 for angle in angles):
        raise ShapeError("keys and values must have one type each, places int32, and angles float32")
    RECALL(
        keys=_bits(kept.keys),
        values=_bits(kept.values),
        key_scale=_bits(kept.key_scale),
        value_scale=_bits(kept.value_scale),
        places=places_P,
        cos=angles[0],
        sin=angles[1],
        keys_out=keys_PD,
        values_out=values_PD,
        P=tokens,
        D=width,
        IS_FLOAT=kept.keys.dtype == torch.float8_e4m3fn,
    )


def _bits(x: Tensor | None) -> Tensor | None:
    """Floats of 8 bits as their bits, because not every architecture has instructions for them."""
    return x.view(torch.int8) if x is not None and x.dtype == torch.float8_e4m3fn else x
