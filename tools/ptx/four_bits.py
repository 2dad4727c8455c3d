"""The kernels of NVFP4 as cases for the machine."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.ptx.proof import Case, hidden, off, randn
from tools.ptx.sizes import Attended, Sizes
from wanforge.plugins.block_quantiser.fused import FourBitMatrix, empty_four_bits, quantise
from wanforge.plugins.dense_attention.fused import dense_attention, dense_attention_into
from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.layer_norm.fused import Affine, norm_four_bits
from wanforge.plugins.layer_norm.reference import modulated_norm
from wanforge.plugins.nvfp4_linear import BLOCK, INPUT_SCALE
from wanforge.plugins.nvfp4_linear.fused import FourBitWeight, linear_gelu, linear_residual, linears, measured_linear
from wanforge.plugins.nvfp4_linear.reference import global_scale_of, nvfp4_linear, quantise_weight
from wanforge.plugins.row_moments.fused import KnownRows, unmeasured
from wanforge.plugins.sparse_linear_attention.fused import sparse_linear_attention, sparse_linear_attention_into
from wanforge.plugins.sparse_linear_attention.reference import Blocks

EPS = 1e-6


def four_bits(dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """The cases of some sizes."""
    yield from attentions(dtype, sizes)
    for rows, width in sizes.quantised:

        def strided(rows: int = rows, width: int = width) -> tuple[Tensor]:
            x = 3 * randn(rows, width + 16, seed=1, dtype=dtype)[:, :width]
            x[rows // 2, 3:] = 0
            return (x,)

        yield Case(
            f"quantiser to 4 bits, {rows}x{width}",
            lambda x: steps(quantise(x)),
            lambda x: steps(by_definition(x)),
            strided,
        )
    yield from products(dtype, sizes)
    for tokens, width in sizes.normed:

        def inputs(tokens: int = tokens, width: int = width) -> tuple[Tensor, ...]:
            return hidden(tokens, width, dtype), *randn(2, width, seed=2)

        yield Case(
            f"modulated layer norm, quantised to 4 bits, {tokens}x{width}",
            lambda x, g, o: steps(norm_four_bits(x, Affine(g, o, EPS, True, False))),
            lambda x, g, o: steps(by_definition(modulated_norm(x[None], o[None], g[None], EPS)[0])),
            inputs,
            steps=2e-3,
        )


def by_definition(x: Tensor) -> FourBitMatrix:
    """A matrix as the definition quantises it."""
    return FourBitMatrix(*quantise_weight(x, x.new_full((), INPUT_SCALE, dtype=torch.float32)))


def steps(x: FourBitMatrix) -> list[Tensor]:
    """The numbers and the scales as integers that are one apart where they are neighbours. Zeros have no sign."""
    codes = torch.stack([x.fp4_MP & 15, x.fp4_MP >> 4], 2).flatten(1).to(torch.int8)
    return [torch.where(codes > 7, 8 - codes, codes), x.scale_MB.view(torch.uint8)]


def weight(outputs: int, inputs: int, seed: int, dtype: torch.dtype) -> FourBitWeight:
    plain = 0.05 * randn(outputs, inputs, seed=seed)
    scale = global_scale_of(plain.abs().amax())
    return FourBitWeight(*quantise_weight(plain, scale), scale, randn(outputs, seed=seed + 1, dtype=dtype))


def products(dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """The linears: with one to three weights, with GELU and a quantised output, and added to a residual. Sums are added
    in another order than the definition's."""
    for rows, outputs, inputs, count in sizes.linears:

        def several(
            rows: int = rows, outputs: int = outputs, inputs: int = inputs, count: int = count
        ) -> tuple[Any, ...]:
            x = randn(rows, inputs, seed=7, dtype=dtype)
            return by_definition(x), tuple(weight(outputs, inputs, 10 * i, dtype) for i in range(count)), x

        yield Case(
            f"linear in 4 bits, {rows}x{outputs}x{inputs}, {count} weights",
            lambda q, weights, x: linears(q, weights),
            lambda q, weights, x: [nvfp4_linear(x, *each) for each in weights],
            several,
            ulp=2,  # the sum before the bias and the sum with it may each round to the other side
        )
    for rows, outputs, inputs in sizes.epilogues:

        def one(rows: int = rows, outputs: int = outputs, inputs: int = inputs) -> tuple[Any, ...]:
            x, residual = randn(rows, inputs, seed=7, dtype=dtype), randn(rows, outputs, seed=5, dtype=dtype)
            return by_definition(x), weight(outputs, inputs, 3, dtype), residual, randn(outputs, seed=6), x

        size = f"{rows}x{outputs}x{inputs}"
        yield Case(
            f"linear in 4 bits with GELU, quantised, {size}",
            lambda q, w, residual, gate, x: steps(linear_gelu(q, w)),
            lambda q, w, residual, gate, x: steps(by_definition(F.gelu(nvfp4_linear(x, *w), approximate="tanh"))),
            one,
            steps=1e-3,
        )
        yield Case(
            f"linear in 4 bits with moments, {size}",
            lambda q, w, residual, gate, x: [measured_linear(q, w).x_LD],
            lambda q, w, residual, gate, x: [nvfp4_linear(x, *w)],
            one,
            ulp=2,
        )
        yield Case(
            f"linear in 4 bits added to a residual, {size}",
            lambda q, w, residual, gate, x: [added(q, w, residual, gate).x_LD],
            lambda q, w, residual, gate, x: [gated_residual(residual[None], nvfp4_linear(x, *w)[None], gate[None])[0]],
            one,
            ulp=3,
        )
        for way, written in (("", lambda q, w, *_: measured_linear(q, w)), (" added to a residual", added)):
            yield Case(
                f"moments of a linear in 4 bits{way}, {size}",
                lambda q, w, residual, gate, x, written=written: off(written(q, w, residual, gate)),
                lambda q, w, residual, gate, x: [torch.ones(2, len(gate) // 128, len(x))],
                one,
                ulp=64,  # sums of 128 in another order
            )


def added(q: FourBitMatrix, w: FourBitWeight, residual: Tensor, gate: Tensor) -> KnownRows:
    rows = unmeasured(residual)
    linear_residual(q, w, residual, gate, rows)
    return rows


def attentions(dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """Attention that quantises its output, which has to be its plain output, quantised by the definition."""
    blocks = Blocks(128, 64, "sage_fp8")
    for size in sizes.packed:

        def some(q: Tensor, k: Tensor, v: Tensor, proj: Tensor, bias: Tensor, size: Attended = size) -> list[Tensor]:
            y = empty_four_bits(len(q), q.shape[1], q.device)
            sparse_linear_attention_into(y, (q, k, v), size.selected, (proj, bias), blocks)
            return apart(y, sparse_linear_attention(q, k, v, size.selected, proj, bias, blocks))

        def sparse(size: Attended = size) -> tuple[Tensor, ...]:
            projection = randn(128, 128, seed=5) / 11, randn(128, seed=6)
            return *asked(size.tokens, size.tokens, size.heads, dtype), *projection

        yield Case(f"attention {blocks.arithmetic}, quantised to 4 bits, {size}", some, nothing, sparse)
    for tokens, heads, keys in sizes.asked:

        def every(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> list[Tensor]:
            y = empty_four_bits(len(q), q.shape[1], q.device)
            dense_attention_into(y, (q, k, v), bias)
            return apart(y, dense_attention(q, k, v, bias))

        def dense(tokens: int = tokens, heads: int = heads, keys: int = keys) -> tuple[Tensor, ...]:
            return *asked(tokens, keys, heads, dtype), randn(keys, seed=4)

        size_of = f"{tokens} tokens, {heads} heads, {keys} keys"
        yield Case(f"attention to all keys, quantised to 4 bits, {size_of}", every, nothing, dense)


def asked(tokens: int, keys: int, heads: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Queries, keys and values of such numbers, whose rows are strided."""
    for seed, rows in enumerate((tokens, keys, keys), 1):
        yield randn(rows, heads * 128 + 16, seed=seed, dtype=dtype)[:, 16:]


def apart(y: FourBitMatrix, plain: Tensor) -> list[Tensor]:
    """How many steps a matrix is away from a plain one."""
    return [found.int() - wanted.int() for found, wanted in zip(steps(y), steps(by_definition(plain)), strict=True)]


def nothing(q: Tensor, *others: Tensor) -> list[Tensor]:
    return [torch.zeros(len(q), width, dtype=torch.int32) for width in (q.shape[1], q.shape[1] // BLOCK)]
