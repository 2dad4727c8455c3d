"""Keys and values in 8 bits.

Values in a group of 64 share a scale. Keys are grouped over the tokens of a chunk, channel by channel, because some of
their channels are much larger than others; values are grouped over the channels of a token.

Source: Causal-rCM, rcm/inference/wan2pt1_t2v_causal_quant_infer.py (docs/sources.md).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from wanforge.plugins.recall import GROUP

KVFormat = Literal["native", "int8", "fp8"]
"""How keys and values are remembered: in the compute type, as integers, or as floats of 8 bits (e4m3)."""

Along = Literal["tokens", "channels"]

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest code of each format."""
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Codes:
    """Numbers in 8 bits.

    Attributes:
        codes: ``[rows, groups, 64]``, the last group of a row filled up with zeros. Rows are channels if groups lie
            along tokens, and tokens of a head otherwise.
        scale: ``[rows, groups, 1]``, e4m3: numbers are codes times it.
        shape: Of the numbers, ``[B, L, H, K]``.
        dtype: Of the numbers.
        along: What groups lie along.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    along: Along

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


def encode(x_BLHK: Tensor, form: Literal["int8", "fp8"], along: Along) -> Codes:
    """Numbers as codes of 8 bits.

    The codes are those of the scale in float32, but the scale is kept in e4m3, as upstream does. So a group may be off
    by a factor of up to 1/16, and by more if its scale is below 2^-6, where e4m3 has steps of 2^-9: that is if its
    largest number is below 2 with int8 and below 7 with fp8. A group whose scale is at most 2^-10 is lost.
    """
    turned = x_BLHK.permute(0, 2, 3, 1) if along == "tokens" else x_BLHK
    rows = turned.flatten(0, -2).float()
    groups = F.pad(rows, (0, -rows.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / LARGEST[form]
    scaled = groups / scale.clamp_min(torch.finfo(torch.float32).tiny)
    codes = (scaled.round() if form == "int8" else scaled).clamp(-LARGEST[form], LARGEST[form]).to(CODES[form])
    return Codes(codes, scale.to(torch.float8_e4m3fn), tuple(x_BLHK.shape), x_BLHK.dtype, along)


def decode(held: Codes) -> Tensor:
    """The numbers that codes stand for, ``[B, L, H, K]`` in their own type."""
    batch, tokens, heads, channels = held.shape
    rows = (held.codes.float() * held.scale.float()).flatten(1)
    if held.along == "channels":
        return rows.view(held.shape).to(held.dtype)
    return rows[:, :tokens].view(batch, heads, channels, tokens).permute(0, 3, 1, 2).to(held.dtype)
