"""The definition of reading remembered keys and values.

Letters: R rows of tokens that are kept, P tokens that are seen, D width, H heads of 128 channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wanforge.plugins.recall import GROUP
from wanforge.plugins.rms_norm_rope.reference import rotate

HEAD = 128


class KeptRows(NamedTuple):
    """Keys and values of one layer, each kept once.

    Attributes:
        keys, values: ``[R, D]``, keys as they leave their norm, before they are rotated; in the type in which attention
            reads them, or codes of 8 bits (int8 or e4m3), which are to be multiplied by their scales.
        key_scale: e4m3 ``[R / 64, D]``: 64 rows share the scale of a channel. None if the keys are no codes.
        value_scale: e4m3 ``[R, D / 64]``: 64 channels of a row share a scale.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


def recall(
    kept: KeptRows, places_P: Tensor, angles: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys, rotated, and values of some tokens.

    Args:
        places_P: Int32 ``[P]``, the row of each token, or -1 where there is none. What is read there means nothing, but
            is finite if the first row is.
        angles: Cosines and sines, float32 ``[P, 64]``.
        dtype: The type of the results; that of the rows, if they are no codes.

    Returns:
        Keys and values, ``[P, D]``. Codes times scales are rounded to `dtype` before they are rotated.
    """
    rows = places_P.clamp_min(0)
    keys_PD, values_PD = kept.keys.index_select(0, rows), kept.values.index_select(0, rows)
    if kept.key_scale is not None and kept.value_scale is not None:
        key_scale_PD = kept.key_scale.index_select(0, rows // GROUP)
        value_scale_PG = kept.value_scale.index_select(0, rows)
        keys_PD = (keys_PD.float() * key_scale_PD.float()).to(dtype)
        grouped = values_PD.float().unflatten(1, (-1, GROUP)) * value_scale_PG.float()[..., None]
        values_PD = grouped.flatten(1).to(dtype)
    return rotate(keys_PD.unflatten(1, (-1, HEAD))[None], *angles)[0].flatten(1), values_PD
