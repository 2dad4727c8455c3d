"""Compares kernels with their definitions before they are timed: at a small ragged size, on the device to be timed,
with the tolerances of the tests."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from wanforge.configs.model import DiTConfig
from wanforge.plugins.gated_residual.fused import add_gated
from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.layer_norm.fused import norm, norm_quantised
from wanforge.plugins.layer_norm.reference import modulated_norm
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.fused import Quantised
from wanforge.plugins.rms_norm_rope.fused import rms_norm_rotate
from wanforge.plugins.rms_norm_rope.reference import rms_norm, rotate
from wanforge.plugins.sparse_linear_attention import fused as attention
from wanforge.plugins.sparse_linear_attention import reference as attention_reference
from wanforge.plugins.w8a8_linear.fused import Weight, linear_gelu, linear_residual, linears
from wanforge.plugins.w8a8_linear.reference import w8a8_linear
from wanforge.runtime.backends.fused_block import FusedBlock
from wanforge.runtime.measure.kernels.cases import block_inputs, block_weights, recipe_on
from wanforge.runtime.measure.kernels.linears import ROWS, TILES, Scheme
from wanforge.runtime.measure.kernels.timing import Draw
from wanforge.runtime.measure.parity.metrics import relative_rms
from wanforge.runtime.reference.dit import Block, attention_blocks, block_arguments, rope_tables, split_heads

GRID = (1, 3, 67)
"""Frames, rows and columns of tokens, whose number is no multiple of 64 or 128."""
TOKENS = math.prod(GRID)
EPS = 1e-6
HALF_SPACING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Largest relative error of one rounding."""
FLOAT32_ERROR = 2e-6
"""Relative RMS error of float32 arithmetic in another order, or with a GPU's exp2."""
STEP = 5e-4
"""Relative RMS error where one key or probability in a million may round to another step of int8 or fp8."""
FLIPPED = 1e-3
"""Relative RMS error where one value in a thousand is off by one step; a tile's values are about 32 steps large."""


@dataclass(frozen=True)
class KernelVerdict:
    """The result of comparing a tensor with its definition.

    Attributes:
        error: Relative RMS error; infinite where shape or type differ, or a value is not finite.
        limit: The largest error allowed; 0 requires exact equality.
    """

    op: str
    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def as_json(self) -> dict[str, Any]:
        error = self.error if self.error < float("inf") else None
        return {"op": self.op, "name": self.name, "error": error, "limit": self.limit, "passed": self.passed}

    def __str__(self) -> str:
        state = "right" if self.passed else "WRONG"
        return f"{state}  {self.op}: {self.name}: relative error {self.error:.1e}, at most {self.limit:.1e}"


Claim = tuple[str, Tensor, Tensor, float]
"""A name, a kernel's result, its definition's result, and the largest error allowed."""


def check(op: str, device: torch.device, dtype: torch.dtype) -> list[KernelVerdict]:
    """Compare an op's kernels with their definitions."""
    with torch.inference_mode():
        claims = CHECKS[op](Draw(0, device, dtype))
        return [KernelVerdict(op, name, error(actual, expected), limit) for name, actual, expected, limit in claims]


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS of the difference; infinite where shape or type differ, or a value is not finite."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype or not actual.double().isfinite().all():
        return float("inf")
    return 0.0 if torch.equal(actual, expected) else relative_rms(actual, expected)


def rounding_error(dtype: torch.dtype, roundings: float) -> float:
    """The largest relative RMS error that this many additional or omitted roundings can cause."""
    return FLOAT32_ERROR if dtype == torch.float32 else roundings * HALF_SPACING[dtype]


def flipped_error(dtype: torch.dtype, roundings: float) -> float:
    """The relative RMS error that so many roundings of a float32 sum can cause. In the share of values that lie close
    enough to a tie of their own type, they decide to which side a value is rounded."""
    share = roundings * HALF_SPACING[torch.float32] / HALF_SPACING[dtype]
    return math.sqrt(share) * 2 * HALF_SPACING[dtype]


def quantised(
    name: str,
    actual: Quantised,
    values: Tensor,
    scheme: Scheme = TILES,
    steps_limit: float = 0,
    scales_limit: float = 0,
) -> list[Claim]:
    """Claims that a kernel quantised these values correctly."""
    steps, scale = scheme.definition(values)
    return [
        (f"{name}, steps", actual.steps_MK, steps, steps_limit),
        (f"{name}, scales", actual.scale, scale, scales_limit),
    ]


def linear_claims(draw: Draw) -> list[Claim]:
    return [claim for scheme in (TILES, ROWS) for claim in scheme_claims(draw, scheme)]


def scheme_claims(draw: Draw, scheme: Scheme) -> list[Claim]:
    # In float32 the interpreter performs the reference's own operations. A compiled kernel joins the product with a
    # tile's scale and the sum over tiles into one operation.
    exact = 0 if draw.dtype == torch.float32 else flipped_error(draw.dtype, 384 / TILE)
    x, residual, gate = draw(TOKENS, 384), draw(TOKENS, 256), draw.float32(256)
    weights = [Weight(*scheme.definition(draw.float32(256, 384, size=0.05)), draw(256)) for _ in range(3)]
    expected = [w8a8_linear(x, *weight) for weight in weights]
    activated = F.gelu(expected[0], approximate="tanh")

    given, how = Quantised(*scheme.definition(x)), scheme.suffix
    added = linear_residual(given, weights[0], residual, gate, torch.empty_like(residual))
    packed, scales_limit = linear_gelu(given, weights[0]), 1e-6 if draw.dtype == torch.float32 else 1e-3
    return [
        *quantised(f"quantise{how}", scheme.quantise(x), x, scheme),
        *((f"{name}{how}", y, e, exact) for name, y, e in zip("qkv", linears(given, weights), expected, strict=True)),
        (f"gated residual{how}", added, gated_residual(residual[None], expected[0][None], gate[None])[0], exact),
        # The kernel computes GELU with another function, whose last bit may lead to another step.
        *quantised(f"GELU, quantised{how}", packed, activated, scheme, FLIPPED, scales_limit),
    ]


def hidden(draw: Draw, width: int) -> Tensor:
    """Random rows of different magnitudes around a mean of 2."""
    x = draw.float32(TOKENS, width) * torch.linspace(0.01, 30, TOKENS, device=draw.device)[:, None] + 2
    return x.to(draw.dtype)


def layer_norm_claims(draw: Draw) -> list[Claim]:
    x, scale, shift = hidden(draw, 384), draw.float32(384), draw.float32(384)
    y = norm(x, scale, shift, EPS, modulated=True)
    # In float32 the first row sets the error: its mean is 200 times its standard deviation.
    limit = 2e-5 if draw.dtype == torch.float32 else rounding_error(draw.dtype, 0.5)
    return [
        ("norm", y, modulated_norm(x[None], shift[None], scale[None], EPS)[0], limit),
        *quantised("norm, quantised", norm_quantised(x, scale, shift, EPS, modulated=True), y),
    ]


def rms_norm_claims(draw: Draw) -> list[Claim]:
    tensors, weights = [hidden(draw, 384) for _ in range(2)], [draw.float32(384) for _ in range(2)]
    cross, angles = hidden(draw, 384), rope_tables(GRID, draw.device)
    plain = rms_norm(cross, weights[0], EPS)
    turned = [
        rotate(split_heads(rms_norm(x, w, EPS)[None]), *angles).flatten(2)[0]
        for x, w in zip(tensors, weights, strict=True)
    ]
    rms_norm_rotate(tensors, weights, EPS, angles)
    rms_norm_rotate([cross], weights[:1], EPS)
    limit = rounding_error(draw.dtype, 0.5)
    names = ("q, rotated", "k, rotated", "cross q")
    return [(*claim, limit) for claim in zip(names, [*tensors, cross], [*turned, plain], strict=True)]


def residual_claims(draw: Draw) -> list[Claim]:
    x, y, gate = draw(TOKENS, 384), draw(TOKENS, 384), draw.float32(384)
    out = add_gated(x, y, gate, torch.empty_like(x))
    return [("gated residual", out, gated_residual(x[None], y[None], gate[None])[0], 0)]


def attention_claims(draw: Draw) -> list[Claim]:
    blocks = attention_blocks(recipe_on(draw.device))
    assert blocks is not None
    q, k, v = (draw(TOKENS, 256) for _ in range(3))
    k += draw(256)
    proj, bias = draw.float32(128, 128, size=128**-0.5), draw.float32(128)
    y = attention.sparse_linear_attention(q, k, v, 2, proj, bias, blocks)
    q_BLHK, k_BLHK, v_BLHK = (split_heads(x[None]) for x in (q, k, v))
    expected = attention_reference.sparse_linear_attention(q_BLHK, k_BLHK, v_BLHK, 2, proj, bias, blocks).flatten(2)[0]
    packed = attention.sparse_linear_attention_quantised(q, k, v, 2, proj, bias, blocks)
    # Apart from float32's own error: the reference rounds four times where the kernel rounds once.
    return [
        ("attention", y, expected, rounding_error(draw.dtype, 4) + STEP),
        *quantised("attention, quantised", packed, y),
    ]


def block_claims(draw: Draw) -> list[Claim]:
    config = DiTConfig(dim=256, ffn_dim=512, num_layers=1)
    recipe = recipe_on(draw.device)
    weights = block_weights(config, recipe, draw)
    inputs = block_inputs(config, draw, GRID, text_rows=21, num_selected=2)
    out = torch.full_like(inputs[0], float("nan"))
    FusedBlock(config, recipe).run(weights, inputs, out)
    with torch.device("meta"):
        reference = Block(config, recipe)
    # A value on the edge between two steps may round to the other one, which moves later values by a step.
    limit = 1e-2 if draw.dtype == torch.float32 else 2e-2
    return [("block", out, functional_call(reference, weights, block_arguments(inputs)), limit)]


CHECKS: Mapping[str, Callable[[Draw], list[Claim]]] = {
    "w8a8_linear": linear_claims,
    "layer_norm": layer_norm_claims,
    "rms_norm_rope": rms_norm_claims,
    "gated_residual": residual_claims,
    "sparse_linear_attention": attention_claims,
    "block": block_claims,
}
"""The functions that make the claims of an op, by its name as in `cases.OPS`."""
