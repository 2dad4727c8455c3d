"""Recipes: which number format each part of the networks runs in, and how much of attention is computed."""

from typing import Literal, Self

import msgspec

from wanforge.configs.loading import Record, load_named

FIRST_FP8_SM = 89
"""The first architecture whose tensor cores multiply 8-bit floats."""
FIRST_FP4_SM = 100
"""The first architecture whose tensor cores multiply 4-bit floats."""


MOST_KEYS_IN_FP16 = 64
"""How many values of at most 2.25 with probabilities of at most 448 may be added up below the largest float16."""


VAEFormat = Literal["bf16", "int8"]


class Recipe(Record, frozen=True):
    """A precision plan of the denoiser and of the VAE's decoder."""

    name: str
    linear: Literal["bf16", "w8a8", "w8a8-row", "fp8-row", "nvfp4"]
    """Format of the linears in the blocks; everything else stays in the compute type or in float32. ``w8a8`` has
    upstream's scales, one per tile of 128x128, and ``w8a8-row`` has one per token and one per output.
    ``fp8-row`` has the same with e4m3 in place of int8. ``nvfp4`` has 4-bit floats, with a scale per 16 of them."""
    attention: Literal["dense", "sla", "sagesla"]
    tile: Literal[64, 128, 256] = 128
    """Rows and columns that share a scale, with ``w8a8`` only. Graphs and kernels exist only for upstream's 128; the
    other values run only on the reference, to show what they would gain or lose."""
    block_q: Literal[64, 128] = 128
    block_k: Literal[64, 128] = 64
    pv: Literal["fp8", "fp16"] = "fp8"
    """Format of probabilities and values, with ``sagesla`` only: fp8 from sm_89 on, fp16 on sm_80 and sm_86."""
    pv_sum: Literal["fp32", "fp16"] = "fp32"
    """Type in which attention adds up the values of a block of keys, with ``sagesla`` only. Blocks are added up in
    float32. With fp16, GeForce multiplies at twice the rate (docs/decisions/0027-fp8-sums.md)."""
    compat: Literal["none", "upstream"] = "none"
    """``upstream`` reproduces the variance bug of TurboDiffusion's FastLayerNorm."""
    vae: VAEFormat = "bf16"
    """Format of the decoder's 3x3x3 convolutions behind a norm, which are nearly all of its operations. With ``bf16``
    they are computed in the compute type, as everything else of the VAE always is
    (docs/decisions/0051-int8-decoding.md)."""

    def __post_init__(self) -> None:
        if self.pv == "fp8" and self.pv_sum == "fp16" and self.block_k > MOST_KEYS_IN_FP16:
            raise ValueError(
                f'pv_sum = "fp16" holds sums of at most {MOST_KEYS_IN_FP16} keys in fp8, not {self.block_k}; use fewer '
                'keys (block_k), or pv_sum = "fp32"'
            )

    def with_full_attention(self) -> Self:
        """The same recipe for a network that was trained with full attention."""
        return msgspec.structs.replace(self, attention="dense")

    @property
    def is_sparse(self) -> bool:
        """Whether self-attention selects key blocks."""
        return self.attention != "dense"

    @property
    def rows_per_scale(self) -> int:
        """Number of activation rows that share a scale in the linears; 1 if rows do not affect each other."""
        return self.tile if self.linear == "w8a8" else 1

    @property
    def is_published(self) -> bool:
        """Whether its linears are those of upstream's quantised files. All other recipes need unquantised files."""
        return self.linear == "w8a8" and self.tile == 128

    @property
    def first_sm(self) -> int:
        """The first architecture whose tensor cores multiply its linears' format; 0 if all do."""
        return {"fp8-row": FIRST_FP8_SM, "nvfp4": FIRST_FP4_SM}.get(self.linear, 0)

    @property
    def has_engines(self) -> bool:
        """Whether TensorRT multiplies its linears' format. It turns 8-bit floats into bfloat16 first."""
        return self.linear != "fp8-row"


def load_recipe(name: str) -> Recipe:
    """The recipe with this name, or the one in this TOML file."""
    return load_named("recipe", "recipes", name, Recipe)
