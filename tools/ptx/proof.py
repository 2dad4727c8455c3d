"""What the compiled kernels compute, compared with the definitions of the ops: every kernel of every recipe.

A case runs a function that launches kernels, on the machine, and compares each result with that of the reference in
float32 or to the bit. Integers have to be equal, except where a value lies between two steps and the reference computes
it by another function. Errors of floating-point results are in units in the last place of their own type, those of
numbers that are smaller than the average of units of the average.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.ptx.bench import Bench
from wanforge.plugins.gated_residual.fused import add_gated
from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.layer_norm.fused import norm, norm_quantised
from wanforge.plugins.layer_norm.reference import layer_norm, modulated_norm
from wanforge.plugins.quantiser import fused as quantiser
from wanforge.plugins.quantiser.reference import quantise_rows, quantise_tiles
from wanforge.plugins.rms_norm_rope.fused import rms_norm_rotate
from wanforge.plugins.rms_norm_rope.reference import rms_norm, rotate
from wanforge.plugins.sparse_linear_attention import fused as attention
from wanforge.plugins.sparse_linear_attention import reference
from wanforge.plugins.sparse_linear_attention.reference import Blocks
from wanforge.plugins.w8a8_linear.fused import Weight, linear_gelu, linear_residual, linears
from wanforge.plugins.w8a8_linear.reference import w8a8_linear
from wanforge.runtime.backends.fused_block import FIRST_FP8_SM

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """Kernels to run, and what they should give.

    Attributes:
        run: Computes tensors from `inputs` with kernels.
        expected: Computes the same tensors by the definition.
        ulp: The largest error of a floating-point result, in units in the last place.
        steps: The largest share of integers that may be a step away; zero where they are defined to the bit.
    """

    name: str
    run: Callable[..., Sequence[Tensor]]
    expected: Callable[..., Sequence[Tensor]]
    inputs: tuple[Any, ...]
    ulp: float = 0.0
    steps: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How far the results of a case are from what they should be.

    Attributes:
        ulp: The largest error of a floating-point result.
        steps: The share of integers that are a step away.
        largest_step: By how many steps an integer is away at most.
    """

    case: Case
    elements: int
    ulp: float
    steps: float
    largest_step: int

    @property
    def is_right(self) -> bool:
        return self.ulp <= self.case.ulp and self.steps <= self.case.steps and self.largest_step <= 1


def prove(case: Case, bench: Bench) -> Outcome:
    """Run a case on the machine.

    Raises:
        FaultError: A thread did what none may do.
    """
    expected = case.expected(*copies(case.inputs))
    results = bench(case.run, *copies(case.inputs))
    ulp, away, largest, integers = 0.0, 0, 0, 0
    for found, wanted in zip(results, expected, strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), case.name
        if found.dtype == torch.int8:
            difference = (found.int() - wanted.int()).abs()
            integers += found.numel()
            away += int((difference != 0).sum())
            largest = max(largest, int(difference.max()))
        else:
            ulp = max(ulp, error_in_ulp(found, wanted))
    return Outcome(case, sum(each.numel() for each in results), ulp, away / max(1, integers), largest)


def copies(inputs: Any) -> Any:
    """The same inputs in other memory, because some ops work in place; strides are kept."""
    if isinstance(inputs, Tensor):
        return inputs.clone(memory_format=torch.preserve_format)
    if isinstance(inputs, tuple):
        values = [copies(each) for each in inputs]
        return type(inputs)(*values) if hasattr(inputs, "_fields") else tuple(values)
    return inputs


def error_in_ulp(found: Tensor, wanted: Tensor) -> float:
    """The largest error, in units in the last place."""
    size = wanted.double().abs()
    size = size.clamp_min(float(size.square().mean().sqrt()))
    unit = torch.exp2(torch.floor(torch.log2(size.clamp_min(1e-30)))) * torch.finfo(wanted.dtype).eps
    error = float(((found.double() - wanted.double()).abs() / unit).max())
    return math.inf if math.isnan(error) else error


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hidden(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of different magnitudes."""
    return (randn(tokens, width, seed=tokens) * torch.linspace(0.01, 30, tokens)[:, None] + 2).to(dtype)


def cases(sm: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every kernel with ragged and whole shapes, as an architecture runs it."""
    yield from quantisers(dtype)
    for name, weight, pack in (("tiles", tile_weight, pack_tiles), ("rows", row_weight, pack_rows)):
        yield from products(name, dtype, weight, pack)
    yield from norms(dtype)
    arithmetics = ("sla", "sage_fp8" if sm >= FIRST_FP8_SM else "sage_fp16")
    for arithmetic in arithmetics:
        yield from attentions(Blocks(128, 64, arithmetic), dtype)  # type: ignore[arg-type]
    yield selection(Blocks(128, 64), dtype)
    yield linear_state(Blocks(128, 64), dtype)


def quantisers(dtype: torch.dtype) -> Iterator[Case]:
    for rows, width in ((333, 384), (128, 256), (1, 128)):
        x = 3 * randn(rows, width + 16, seed=1, dtype=dtype)[:, :width]
        x[rows // 2, 3:] = 0
        yield Case(f"quantiser by tiles, {rows}x{width}", quantiser.quantise, quantise_tiles, (x,))
        yield Case(f"quantiser by rows, {rows}x{width}", quantiser.quantise_rows, quantise_rows, (x,))


def pack_tiles(x: Tensor) -> quantiser.Quantised:
    return quantiser.Quantised(*quantise_tiles(x))


def pack_rows(x: Tensor) -> quantiser.Quantised:
    return quantiser.Quantised(*quantise_rows(x))


def tile_weight(outputs: int, inputs: int, seed: int, dtype: torch.dtype) -> Weight:
    return Weight(*quantise_tiles(0.05 * randn(outputs, inputs, seed=seed)), randn(outputs, seed=seed + 1, dtype=dtype))


def row_weight(outputs: int, inputs: int, seed: int, dtype: torch.dtype) -> Weight:
    return Weight(*quantise_rows(0.05 * randn(outputs, inputs, seed=seed)), randn(outputs, seed=seed + 1, dtype=dtype))


def products(
    name: str,
    dtype: torch.dtype,
    weight: Callable[..., Weight],
    pack: Callable[[Tensor], quantiser.Quantised],
) -> Iterator[Case]:
    """The linears: with one to three weights, with GELU and a quantised output, and added to a residual."""
    unpacked = quantise_tiles if name == "tiles" else quantise_rows
    for rows, outputs, inputs, count in ((333, 256, 384, 3), (128, 128, 256, 1)):
        x, weights = (
            randn(rows, inputs, seed=7, dtype=dtype),
            tuple(weight(outputs, inputs, 10 * i, dtype) for i in range(count)),
        )
        yield Case(
            f"linear by {name}, {rows}x{outputs}x{inputs}, {count} weights",
            lambda q, weights, x: linears(q, weights),
            lambda q, weights, x: [w8a8_linear(x, *each) for each in weights],
            (pack(x), weights, x),
            ulp=2,  # the sum before the bias and the sum with it may each round to the other side
        )
    x, one, residual, gate = (
        randn(333, 256, seed=7, dtype=dtype),
        weight(384, 256, 3, dtype),
        randn(333, 384, seed=5, dtype=dtype),
        randn(384, seed=6),
    )
    yield Case(
        f"linear by {name} with GELU, quantised",
        lambda q, w, x: linear_gelu(q, w),
        lambda q, w, x: unpacked(F.gelu(w8a8_linear(x, *w), approximate="tanh")),
        (pack(x), one, x),
        ulp=2**18,  # the scale is a rounded value of the 16-bit type, which may be the next one
        steps=1e-3,
    )
    yield Case(
        f"linear by {name} added to a residual",
        lambda q, w, residual, gate, x: [linear_residual(q, w, residual, gate, residual)],
        lambda q, w, residual, gate, x: [gated_residual(residual[None], w8a8_linear(x, *w)[None], gate[None])[0]],
        (pack(x), one, residual, gate, x),
        ulp=3,
    )


def norms(dtype: torch.dtype) -> Iterator[Case]:
    for tokens, width in ((333, 384), (37, 1536)):
        x, (gain, offset) = hidden(tokens, width, dtype), randn(2, width, seed=2)
        yield Case(
            f"layer norm, {tokens}x{width}",
            lambda x, g, o: [norm(x, g, o, EPS, modulated=False)],
            lambda x, g, o: [layer_norm(x, g, o, EPS)],
            (x, gain, offset),
            ulp=2,
        )
        yield Case(
            f"modulated layer norm, {tokens}x{width}",
            lambda x, g, o: [norm(x, g, o, EPS, modulated=True)],
            lambda x, g, o: [modulated_norm(x[None], o[None], g[None], EPS)[0]],
            (x, gain, offset),
            ulp=4,  # the reference rounds the norm, the product and the sum
        )
        yield Case(
            f"modulated layer norm, quantised, {tokens}x{width}",
            lambda x, g, o: norm_quantised(x, g, o, EPS, modulated=True),
            lambda x, g, o: quantise_tiles(modulated_norm(x[None], o[None], g[None], EPS)[0]),
            (x, gain, offset),
            ulp=2**18,
            steps=2e-3,
        )
        angle = 100 * randn(tokens, 64, seed=4)
        yield Case(
            f"RMS norm and rotation, {tokens}x{width}",
            lambda x, g, cos, sin: rotated(x, g, cos, sin),
            lambda x, g, cos, sin: [rotate(rms_norm(x, g, EPS)[None].unflatten(-1, (-1, 128)), cos, sin).flatten(2)[0]],
            (x, gain, angle.cos(), angle.sin()),
            ulp=2,
        )
    x, y, gate = randn(333, 384, seed=5, dtype=dtype), randn(333, 384, seed=6, dtype=dtype), randn(384, seed=7)
    yield Case(
        "gated residual",
        lambda x, y, g: [add_gated(x, y, g, x)],
        lambda x, y, g: [gated_residual(x[None], y[None], g[None])[0]],
        (x, y, gate),
    )


def rotated(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    rms_norm_rotate([x], [gain], EPS, (cos, sin))
    return [x]


def attentions(blocks: Blocks, dtype: torch.dtype) -> Iterator[Case]:
    for tokens, heads, selected in ((333, 2, 2), (256, 1, 4)):
        q, k, v = (randn(tokens, heads * 128 + 16, seed=seed, dtype=dtype)[:, 16:] for seed in (1, 2, 3))
        proj, bias = randn(128, 128, seed=5) / 11, randn(128, seed=6)

        def run(*tensors: Tensor, selected: int = selected) -> list[Tensor]:
            q, k, v, proj, bias = tensors
            return [attention.sparse_linear_attention(q, k, v, selected, proj, bias, blocks)]

        def expected(*tensors: Tensor, selected: int = selected) -> list[Tensor]:
            q, k, v = (x[None].unflatten(-1, (-1, 128)) for x in tensors[:3])
            proj, bias = tensors[3:]
            return [reference.sparse_linear_attention(q, k, v, selected, proj, bias, blocks).flatten(2)[0]]

        # The reference rounds four times where the kernel rounds once, and keys or probabilities may be a step away.
        yield Case(f"attention {blocks.arithmetic}, {tokens} tokens", run, expected, (q, k, v, proj, bias), ulp=8)
    if blocks.arithmetic != "sla":
        yield Case(
            f"keys and values of attention {blocks.arithmetic}, 333 tokens",
            lambda k, v, proj: eight_bit(attention.prepare_keys(k, v, proj, blocks)),
            lambda k, v, proj: eight_bit_reference(k, v, blocks),
            (randn(333, 256, seed=2, dtype=dtype), randn(333, 256, seed=3, dtype=dtype), randn(128, 128, seed=5)),
            steps=2e-4,  # the reference multiplies the values by a reciprocal, as upstream does, which rounds twice
        )
    q, k, v = (randn(200, 128, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    yield Case(
        f"attention {blocks.arithmetic}, quantised",
        lambda *tensors: quantised_twice(tensors, blocks),
        lambda *tensors: [torch.zeros(200, 128, dtype=torch.int8), torch.zeros(2, 1)],
        (q, k, v, randn(128, 128, seed=5) / 11, randn(128, seed=6)),
    )


def selection(blocks: Blocks, dtype: torch.dtype) -> Case:
    """The means of key blocks, scores, and what is selected by them. Attention hardly shows errors of the first two,
    which change few selections."""
    q, k, v = (randn(333, 256, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    q_BHLK, k_BHLK = (x[None].unflatten(-1, (-1, 128)).transpose(1, 2) for x in (q, k))
    smooth = k_BHLK - k_BHLK.mean(2, keepdim=True)
    pooled = reference.mean_pool(smooth, blocks.k)[0]
    means = reference.mean_pool(q_BHLK, blocks.q)[0]
    scores = (means.float() @ pooled.float().transpose(1, 2)).to(dtype)

    def run(*tensors: Tensor) -> list[Tensor]:
        q, k, v, proj, pooled, scores = tensors
        found = attention.prepare_keys(k, v, proj, blocks).pooled_HNK
        return [
            found,
            attention.block_scores(q, pooled, blocks),
            attention.select_blocks(scores, 2).to(torch.int8),
        ]

    return Case(
        "selection of attention, 333 tokens",
        run,
        lambda *tensors: [pooled, scores, reference.select_blocks(scores[None], 2)[0].to(torch.int8)],
        (q, k, v, randn(128, 128, seed=5), pooled, scores),
        ulp=1,  # sums of another order may round to the other side
    )


def linear_state(blocks: Blocks, dtype: torch.dtype) -> Case:
    """What the linear branch of attention needs of all keys and values, each head's times the projection."""
    k, v, proj = randn(500, 256, seed=2, dtype=dtype), randn(500, 256, seed=3, dtype=dtype), randn(128, 128, seed=5)

    def run(k: Tensor, v: Tensor, proj: Tensor) -> list[Tensor]:
        keys = attention.prepare_keys(k, v, proj, blocks)
        return [keys.folded_HKK, keys.folded_mass_HK.to(dtype)]

    def expected(k: Tensor, v: Tensor, proj: Tensor) -> list[Tensor]:
        k_HLK, v_HLK = (x.unflatten(-1, (-1, 128)).transpose(0, 1) for x in (k, v))
        phi = torch.softmax(k_HLK, -1).float()
        state = (phi.transpose(1, 2) @ v_HLK.float()).to(dtype)
        return [(state.float() @ proj.to(dtype).float().T).to(dtype), phi.sum(1).to(dtype)]

    return Case("linear state of attention", run, expected, (k, v, proj), ulp=2)  # exponentials are approximate


def eight_bit(keys: attention.Keys) -> list[Tensor]:
    """The keys in steps and the values in their format, as integers, [H, padded, K] and [H, K, padded]."""
    assert keys.k_step is not None
    values = keys.v.view(torch.int8) if keys.v.dtype == torch.float8_e4m3fn else keys.v
    return [keys.k, keys.k_step, values]


def eight_bit_reference(k: Tensor, v: Tensor, blocks: Blocks) -> list[Tensor]:
    """The same by the definition."""
    k_BHLK, v_BHLK = (x[None].unflatten(-1, (-1, 128)).transpose(1, 2) for x in (k, v))
    steps, step = reference.quantise_rows(k_BHLK - k_BHLK.mean(2, keepdim=True), blocks.k)
    padding = (0, 0, 0, -len(k) % blocks.k)
    if blocks.arithmetic == "sage_fp16":
        return [steps[0].flatten(1, 2).to(torch.int8), step[0], F.pad(v_BHLK[0].half(), padding)]
    values, _ = reference.quantise_values(v_BHLK)
    codes = F.pad(values[0].float(), padding).to(torch.float8_e4m3fn).view(torch.int8).transpose(1, 2)
    return [steps[0].flatten(1, 2).to(torch.int8), step[0], codes]


def quantised_twice(tensors: Sequence[Tensor], blocks: Blocks) -> list[Tensor]:
    """The difference between attention that quantises its output and its plain output, quantised by the definition."""
    q, k, v, proj, bias = tensors
    y = attention.sparse_linear_attention_quantised(q, k, v, 2, proj, bias, blocks)
    steps, scale = quantise_tiles(attention.sparse_linear_attention(q, k, v, 2, proj, bias, blocks))
    return [y.steps_MK - steps, y.scale - scale]
