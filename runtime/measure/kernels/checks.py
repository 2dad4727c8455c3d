"""Compares kernels with their definitions before they are timed, on the device to be timed: at a small ragged size, and
at the size that is timed.

At real sizes the definitions run in pieces of rows, so that they fit, and those that take long on a sample: products on
some rows, attention and the block on some query blocks, whose results depend on all keys and values.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanforge.configs.model import DiTConfig
from wanforge.configs.recipe import FIRST_FP8_SM
from wanforge.plugins.denoiser_block.fused import FusedBlock
from wanforge.plugins.dense_attention import reference as dense_reference
from wanforge.plugins.dense_attention.fused import QueryNorm, dense_attention, dense_attention_into
from wanforge.plugins.gated_residual.fused import add_gated
from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.launching.launch import architecture_of
from wanforge.plugins.layer_norm.fused import Affine, norm, norm_quantised, norm_quantised_rows
from wanforge.plugins.layer_norm.reference import modulated_norm
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.fused import Quantised, empty_quantised, quantise_rows, quantised_rows
from wanforge.plugins.quantiser.reference import quantise_rows as reference_rows
from wanforge.plugins.rms_norm_rope.fused import rms_norm_rotate
from wanforge.plugins.rms_norm_rope.reference import rms_norm, rotate
from wanforge.plugins.row_moments.fused import KnownRows, measured, unmeasured
from wanforge.plugins.row_moments.reference import row_moments
from wanforge.plugins.sparse_linear_attention import fused as attention
from wanforge.plugins.sparse_linear_attention import reference as attention_reference
from wanforge.plugins.sparse_linear_attention.reference import attention_blocks
from wanforge.plugins.w8a8_linear.fused import Weight, linear_gelu, linear_residual, linears
from wanforge.plugins.w8a8_linear.reference import w8a8_linear
from wanforge.plugins.w8a8_linear.scaled_product import GELU_QUANTISE_ROWS, scaled_linear
from wanforge.runtime.measure.kernels import chunks
from wanforge.runtime.measure.kernels.cases import block_inputs, block_weights, recipe_on
from wanforge.runtime.measure.kernels.decoder import channel_norm_claims, int8_convolution_claims
from wanforge.runtime.measure.kernels.linears import ROWS, TILES, Scheme
from wanforge.runtime.measure.kernels.pieces import PIECE, SMALL, CheckedSize, by_heads, cut, in_pieces
from wanforge.runtime.measure.kernels.timing import Draw
from wanforge.runtime.measure.parity.metrics import TINY
from wanforge.runtime.reference.dit import Block, block_arguments, rope_tables, split_heads

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
        tokens: The number of tokens for which it was computed.
        error: Relative RMS error; infinite where shape or type differ, or a value is not finite.
        limit: The largest error allowed; 0 requires exact equality.
    """

    op: str
    name: str
    tokens: int
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    def as_json(self) -> dict[str, Any]:
        error = self.error if self.error < float("inf") else None
        return {
            "op": self.op,
            "name": self.name,
            "tokens": self.tokens,
            "error": error,
            "limit": self.limit,
            "passed": self.passed,
        }

    def __str__(self) -> str:
        state = "right" if self.passed else "WRONG"
        found = f"relative error {self.error:.1e}, at most {self.limit:.1e}"
        return f"{state}  {self.op}: {self.name}, {self.tokens} tokens: {found}"


Claim = tuple[str, Tensor, Tensor, float]
"""A name, a kernel's result, its definition's result, and the largest error allowed."""


def check(op: str, device: torch.device, dtype: torch.dtype, size: CheckedSize = SMALL) -> list[KernelVerdict]:
    """Compare an op's kernels with their definitions."""
    with torch.inference_mode():
        return [
            KernelVerdict(op, name, size.tokens, error(actual, expected), limit)
            for name, actual, expected, limit in CHECKS[op](Draw(0, device, dtype), size)
        ]


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS of the difference; infinite where shape or type differ, or a value is not finite."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    away, total = 0.0, 0.0
    for some, wanted in zip(actual.split(PIECE), expected.split(PIECE), strict=True):
        a, e = some.double(), wanted.double()
        if not a.isfinite().all():
            return math.inf
        away += float((a - e).square().sum())
        total += float(e.square().sum())
    return 0.0 if away == 0 else math.sqrt(away / max(total, TINY))


def rounding_error(dtype: torch.dtype, roundings: float) -> float:
    """The largest relative RMS error that this many additional or omitted roundings can cause."""
    return FLOAT32_ERROR if dtype == torch.float32 else roundings * HALF_SPACING[dtype]


def flipped_error(dtype: torch.dtype, roundings: float) -> float:
    """The relative RMS error that so many roundings of a float32 sum can cause. In the share of values that lie close
    enough to a tie of their own type, they decide to which side a value is rounded; in float32, each moves the last
    bit."""
    share = roundings * HALF_SPACING[torch.float32] / HALF_SPACING[dtype]
    return math.sqrt(share) * 2 * HALF_SPACING[dtype]


def quantised(
    name: str,
    actual: Quantised,
    values: Tensor,
    scheme: Scheme = TILES,
    steps_limit: float = 0,
    scales_limit: float = 0,
) -> Iterator[Claim]:
    """Claims that a kernel quantised these values correctly."""
    parts = [scheme.definition(piece) for piece in values.split(PIECE)]
    steps, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    yield f"{name}, steps", actual.steps_MK, steps, steps_limit
    yield f"{name}, scales", actual.scale, scale, scales_limit


def linear_claims(draw: Draw, size: CheckedSize) -> Iterator[Claim]:
    for scheme in (TILES, ROWS):
        yield from scheme_claims(draw, scheme, size)
    yield from library_claims(draw, size)


def library_claims(draw: Draw, size: CheckedSize) -> Iterator[Claim]:
    """What is around products that a library computes, and where there are 8-bit floats the product."""
    y = draw(size.tokens, size.ffn_dim)
    found = quantised_rows(GELU_QUANTISE_ROWS, y, torch.int8)
    scales_limit = 1e-6 if draw.dtype == torch.float32 else 1e-3
    yield from quantised(
        "GELU and quantise, by rows", found, F.gelu(y, approximate="tanh"), ROWS, FLIPPED, scales_limit
    )
    if draw.device.type != "cpu" and architecture_of(draw.device) < FIRST_FP8_SM:
        return
    x, fp8 = draw(size.tokens, size.dim), torch.float8_e4m3fn
    weight = Weight(*reference_rows(draw(size.dim, size.dim, size=size.dim**-0.5), fp8), draw(size.dim))
    product = scaled_linear(quantise_rows(x, fp8), weight)
    expected = in_pieces(lambda x: w8a8_linear(x, *weight), size.some, x)
    # The library rounds once where the definition rounds twice, and adds up in float32 or less.
    yield "product in fp8", cut(product, size.some), expected, rounding_error(draw.dtype, 1.5)


def scheme_claims(draw: Draw, scheme: Scheme, size: CheckedSize) -> Iterator[Claim]:
    how, rows, width, wide = scheme.suffix, size.some, size.dim, size.ffn_dim
    x, residual, gate = draw(size.tokens, width), draw(size.tokens, width), draw.float32(width)
    yield from quantised(f"quantise{how}", scheme.quantise(x), x, scheme)

    def weight(outputs: int, inputs: int) -> Weight:
        return Weight(*scheme.definition(draw.float32(outputs, inputs, size=inputs**-0.5)), draw(outputs))

    def expected(given: Tensor, weight: Weight) -> Tensor:
        return in_pieces(lambda x: w8a8_linear(x, *weight), rows, given)

    def limit(inputs: int) -> float:
        # By rows, the interpreter performs the reference's own operations in float32. By tiles, the product with a
        # tile's scale and the sum over tiles are joined into one operation.
        by_rows = draw.dtype == torch.float32 and scheme is ROWS
        return 0 if by_rows else flipped_error(draw.dtype, inputs / TILE)

    weights, packed = [weight(width, width) for _ in range(3)], scheme.quantise(x)
    for name, one, y in zip("qkv", weights, linears(packed, weights), strict=True):
        yield f"{name}{how}", cut(y, rows), expected(x, one), limit(width)
    activated = weight(wide, width)
    found, values = linear_gelu(packed, activated), F.gelu(expected(x, activated), approximate="tanh")
    # The kernel computes GELU with another function, whose last bit may lead to another step.
    some = Quantised(cut(found.steps_MK, rows), cut(found.scale, [scale_rows(each, scheme) for each in rows]))
    scales_limit = 1e-6 if draw.dtype == torch.float32 else 1e-3
    yield from quantised(f"GELU, quantised{how}", some, values, scheme, FLIPPED, scales_limit)
    last, x = weight(width, wide), draw(size.tokens, wide)
    out = unmeasured(torch.empty_like(residual))
    added = linear_residual(scheme.quantise(x), last, residual, gate, *out)
    wanted = gated_residual(cut(residual, rows)[None], expected(x, last)[None], gate[None])[0]
    yield f"gated residual{how}", cut(added, rows), wanted, limit(wide)
    assert out.moments_2TL is not None
    moments = in_pieces(lambda x: row_moments(x).movedim(-1, 0), size.pieces, added)
    yield f"moments of rows{how}", out.moments_2TL.movedim(-1, 0), moments, FLOAT32_ERROR


def scale_rows(rows: slice, scheme: Scheme) -> slice:
    """The rows of the scales of some rows, which begin at a tile."""
    return rows if scheme is ROWS else slice(rows.start // TILE, -(-rows.stop // TILE))


def hidden(draw: Draw, size: CheckedSize) -> Tensor:
    """Random rows of different magnitudes around a mean of 2."""
    x = draw.float32(size.tokens, size.dim)
    x *= torch.linspace(0.01, 30, size.tokens, device=draw.device)[:, None]
    return (x + 2).to(draw.dtype)


def layer_norm_claims(draw: Draw, size: CheckedSize) -> Iterator[Claim]:
    x, scale, shift = hidden(draw, size), draw.float32(size.dim), draw.float32(size.dim)
    y = norm(x, scale, shift, EPS, modulated=True)
    # In float32 the first row sets the error: its mean is 200 times its standard deviation.
    limit = 2e-5 if draw.dtype == torch.float32 else rounding_error(draw.dtype, 0.5)
    expected = in_pieces(lambda x: modulated_norm(x[None], shift[None], scale[None], EPS)[0], size.pieces, x)
    yield "norm", y, expected, limit
    affine = Affine(scale, shift, EPS, True, False)
    yield from quantised("norm, quantised", norm_quantised(KnownRows(x), affine), y)
    # Sums in another order may have a value round to the other side, and then to the next step.
    yield from quantised("norm of known moments", norm_quantised(measured(x), affine), y, TILES, FLIPPED, limit)
    by_rows = norm_quantised_rows(x, affine, torch.int8)
    yield from quantised("norm, quantised by rows", by_rows, y, ROWS, FLIPPED, limit)


def rms_norm_claims(draw: Draw, size: CheckedSize) -> Iterator[Claim]:
    weights, angles = [draw.float32(size.dim) for _ in range(2)], rope_tables(size.grid, draw.device)
    tensors = [hidden(draw, size) for _ in range(2)]
    limit = rounding_error(draw.dtype, 0.5)

    def turned(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
        return rotate(split_heads(rms_norm(x, weight, EPS)[None]), cos, sin).flatten(2)[0]

    expected = [
        in_pieces(partial(turned, weight=weight), size.pieces, x, *angles)
        for x, weight in zip(tensors, weights, strict=True)
    ]
    rms_norm_rotate(tensors, weights, EPS, angles)
    yield "q, rotated", tensors[0], expected[0], limit
    yield "k, rotated", tensors[1], expected[1], limit


def residual_claims(draw: Draw, size: CheckedSize) -> Iterator[Claim]:
    x, y, gate = draw(size.tokens, size.dim), draw(size.tokens, size.dim), draw.float32(size.dim)
    out = add_gated(x, y, gate, torch.empty_like(x))
    expected = in_pieces(lambda x, y: gated_residual(x[None], y[None], gate[None])[0], size.pieces, x, y)
    yield "gated residual", out, expected, 0


def decoder_claims(draw: Draw, size: CheckedSize) -> Iterator[Claim]:
    return channel_norm_claims(draw, size, rounding_error(draw.dtype, 0.5))


def convolution_claims(draw: Draw, size: CheckedSize) -> Iterator[Claim]:
    return int8_convolution_claims(draw, size, rounding_error(draw.dtype, 0.5))


def dense_claims(draw: Draw, size: CheckedSize) -> Iterator[Claim]:
    q, k, v = draw(size.tokens, size.dim), draw(size.text_rows, size.dim), draw(size.text_rows, size.dim)
    # The definition adds biases in the type of the queries.
    bias = draw(size.text_rows).float()
    y = dense_attention(q, k, v, bias)

    def attend(q: Tensor) -> Tensor:
        heads = [split_heads(x[None]) for x in (q, k, v)]
        return dense_reference.dense_attention(heads[0], heads[1], heads[2], bias).flatten(2)[0]

    # Both round probabilities and results, at other sizes.
    yield "attention to all keys", y, in_pieces(attend, size.pieces, q), rounding_error(draw.dtype, 2)
    packed = empty_quantised(size.tokens, size.dim, q.device)
    dense_attention_into(packed, (q, k, v), bias)
    yield from quantised("attention to all keys, quantised", packed, y)
    wide, weight = hidden(draw, size), draw.float32(size.dim)
    moments = measured(wide).moments_2TL
    assert moments is not None
    normed = dense_attention(wide, k, v, bias, QueryNorm(moments, weight, EPS))
    expected = in_pieces(lambda x: attend(rms_norm(x, weight, EPS)), size.pieces, wide)
    # The kernel rounds keys times the weight, the reference rounds the queries.
    yield "attention of normalised queries", normed, expected, rounding_error(draw.dtype, 3)
    yield from chunks.attention_claims(draw, min(size.tokens, PIECE), size.dim, rounding_error(draw.dtype, 2))


def recall_claims(draw: Draw, size: CheckedSize) -> Iterator[Claim]:
    return chunks.recall_claims(draw, size.tokens, size.dim, rounding_error(draw.dtype, 0.5))


def attention_claims(draw: Draw, size: CheckedSize) -> Iterator[Claim]:
    blocks = attention_blocks(recipe_on(draw.device))
    assert blocks is not None
    q, k, v = (draw(size.tokens, size.dim) for _ in range(3))
    k += draw(size.dim)
    proj, bias = draw.float32(128, 128, size=128**-0.5), draw.float32(128)
    y = attention.sparse_linear_attention(q, k, v, size.num_selected, proj, bias, blocks)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference.sparse_linear_attention(q, k, v, size.num_selected, proj, bias, blocks)

    expected = by_heads(attend, *(split_heads(x[None]) for x in (cut(q, size.queries), k, v)))
    # Apart from float32's own error: the reference rounds four times where the kernel rounds once.
    yield "attention", cut(y, size.queries), expected.flatten(2)[0], rounding_error(draw.dtype, 4) + STEP
    packed = empty_quantised(size.tokens, size.dim, q.device)
    attention.sparse_linear_attention_into(packed, (q, k, v), size.num_selected, (proj, bias), blocks)
    yield from quantised("attention, quantised", packed, y)


def block_claims(draw: Draw, size: CheckedSize) -> Iterator[Claim]:
    config = DiTConfig(dim=size.dim, ffn_dim=size.ffn_dim, num_layers=1)
    recipe = recipe_on(draw.device)
    weights = block_weights(config, recipe, draw)
    inputs = block_inputs(config, draw, size.grid, size.text_rows, size.num_selected)
    out = torch.full_like(inputs[0], float("nan"))
    FusedBlock(config, recipe).run(weights, inputs, out)
    with torch.device("meta"):
        block = Block(config, recipe)
    block.load_state_dict(weights, assign=True)
    # A value on the edge between two steps may round to the other one, which moves later values by a step.
    limit = 1e-2 if draw.dtype == torch.float32 else 2e-2
    yield "block", cut(out[0], size.queries), rows_of_block(block, inputs, size)[0], limit


def rows_of_block(block: Block, inputs: Sequence[Tensor], size: CheckedSize) -> Tensor:
    """The output of a block for the rows of some query blocks, by the definition. Queries, keys and values of all rows
    are computed in pieces, and everything after attention for these rows alone."""
    x_BLD, modulation_B6D, text, angles, selection_S = block_arguments(inputs)
    shift, scale, *_ = modulation_B6D.unbind(1)
    attn = block.self_attn
    blocks = attn.blocks
    assert blocks is not None

    def project(x_LD: Tensor, cos_LP: Tensor, sin_LP: Tensor) -> Tensor:
        a_BLD = block.modulate(x_LD[None], shift, scale)
        turned = [
            rotate(split_heads(norm(linear(a_BLD))), cos_LP, sin_LP)
            for norm, linear in ((attn.norm_q, attn.q), (attn.norm_k, attn.k))
        ]
        return torch.stack([*turned, split_heads(attn.v(a_BLD))], 2)[0]

    def attend(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor) -> Tensor:
        proj = attn.attn_op.local_attn.proj_l
        given = q_BLHK, k_BLHK, v_BLHK, len(selection_S), proj.weight, proj.bias
        return attention_reference.sparse_linear_attention(*given, blocks)

    q, k, v = in_pieces(project, size.pieces, x_BLD[0], *angles)[None].unbind(2)
    y_BLHK = by_heads(attend, cut(q[0], size.queries)[None], k, v)
    block.self_attn = Attended(attn.o(y_BLHK.flatten(2)))  # type: ignore[assignment]
    some = cut(x_BLD[0], size.queries)[None]
    found: Tensor = block(some, modulation_B6D, text, angles, selection_S)
    return found


class Attended(nn.Module):
    """Stands for self-attention, whose result is known."""

    def __init__(self, y_BLD: Tensor) -> None:
        super().__init__()
        self.y_BLD = y_BLD

    def forward(self, *_: Tensor) -> Tensor:
        return self.y_BLD


CHECKS: Mapping[str, Callable[[Draw, CheckedSize], Iterator[Claim]]] = {
    "w8a8_linear": linear_claims,
    "layer_norm": layer_norm_claims,
    "rms_norm_rope": rms_norm_claims,
    "gated_residual": residual_claims,
    "channel_norm": decoder_claims,
    "int8_convolution": convolution_claims,
    "dense_attention": dense_claims,
    "recall": recall_claims,
    "sparse_linear_attention": attention_claims,
    "block": block_claims,
}
"""The functions that make the claims of an op, by its name as in `cases.OPS`. Each claim is computed when it is asked
for, so that its tensors are gone before the next."""
