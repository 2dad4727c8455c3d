"""Every kernel of every recipe as cases for the machine, at given sizes."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.ptx.four_bits import four_bits
from tools.ptx.proof import Case, hidden, off, randn
from tools.ptx.sizes import Attended, Sizes
from wanforge.configs.limits import load_limits
from wanforge.configs.model import load_model
from wanforge.configs.recipe import FIRST_FP8_SM, load_recipe
from wanforge.configs.topk import num_selected
from wanforge.exporter.checkpoint.embedded import embedded
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.plugins.channel_norm import PAST
from wanforge.plugins.channel_norm import fused as channel_norm
from wanforge.plugins.channel_norm.fused import History, Stream
from wanforge.plugins.channel_norm.reference import channel_norm as norm_of_channels
from wanforge.plugins.channel_norm.reference import unfolded
from wanforge.plugins.denoiser_block.fused import UNKNOWN, FusedBlock, StreamMoments, passes_moments, recipe_for
from wanforge.plugins.dense_attention import fused as dense
from wanforge.plugins.dense_attention.reference import dense_attention
from wanforge.plugins.gated_residual.fused import add_gated
from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.int8_convolution.fused import ConvolutionWeight, convolve, taps_last
from wanforge.plugins.int8_convolution.reference import channel_steps, int8_convolution, steps_per_unit
from wanforge.plugins.layer_norm.fused import Affine, norm, norm_quantised, norm_quantised_rows
from wanforge.plugins.layer_norm.reference import layer_norm, modulated_norm
from wanforge.plugins.nvfp4_linear import ARCHITECTURES
from wanforge.plugins.quantiser import fused as quantiser
from wanforge.plugins.quantiser.reference import quantise_rows, quantise_tiles
from wanforge.plugins.recall import GROUP
from wanforge.plugins.recall.fused import recall_into
from wanforge.plugins.recall.reference import KeptRows
from wanforge.plugins.rms_norm_rope.fused import rms_norm_rotate
from wanforge.plugins.rms_norm_rope.reference import rms_norm, rotate
from wanforge.plugins.row_moments.fused import KnownRows, measured, unmeasured
from wanforge.plugins.row_moments.reference import row_moments
from wanforge.plugins.sparse_linear_attention import fused as attention
from wanforge.plugins.sparse_linear_attention import reference
from wanforge.plugins.sparse_linear_attention.reference import Blocks
from wanforge.plugins.w8a8_linear.fused import Weight, linear_gelu, linear_residual, linears, measured_linear
from wanforge.plugins.w8a8_linear.reference import w8a8_linear
from wanforge.plugins.w8a8_linear.scaled_product import GELU_QUANTISE_ROWS
from wanforge.runtime.backends.recalling import FORMS
from wanforge.runtime.causal.kept_chunks import keep
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.kernels.cases import block_inputs
from wanforge.runtime.measure.kernels.timing import Draw
from wanforge.runtime.memory.weights import Weights
from wanforge.runtime.reference.causal.kv_codes import CODES, KVFormat, decode, encode
from wanforge.runtime.reference.causal.network import KeysValues

EPS = 1e-6
HEAD = 128
FP8 = torch.float8_e4m3fn


def cases(sm: int, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """The cases of some sizes, as an architecture runs them."""
    yield from quantisers(sm, dtype, sizes)
    for scheme in (TILES, ROWS):
        yield from products(scheme, dtype, sizes)
    if sm in ARCHITECTURES:
        yield from four_bits(dtype, sizes)
    yield from norms(dtype, sizes)
    yield from convolutions(sm, dtype, sizes)
    arithmetics = ("sla", "sage_fp8" if sm >= FIRST_FP8_SM else "sage_fp16")
    for arithmetic in arithmetics:
        yield from attentions(Blocks(128, 64, arithmetic), dtype, sizes)  # type: ignore[arg-type]
    for shape in sizes.asked:
        yield from answered(shape, dtype)
    for form, shape in product(FORMS, sizes.asked):
        yield from remembered(form, shape, dtype)
    for shape in sizes.scored:
        yield scores(shape, dtype)
    for rank in sizes.ranked:
        yield ranks(rank, dtype)
    for model, recipe in sizes.blocks:
        made = load_recipe(recipe)
        if sm >= made.first_sm and (made.linear != "nvfp4" or sm in ARCHITECTURES):
            yield block(model, recipe, sm, dtype)


# Quantisers.


def quantisers(sm: int, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    for rows, width in sizes.quantised:

        def inputs(rows: int = rows, width: int = width) -> tuple[Tensor]:
            x = 3 * randn(rows, width + 16, seed=1, dtype=dtype)[:, :width]
            x[rows // 2, 3:] = 0
            return (x,)

        yield Case(f"quantiser by tiles, {rows}x{width}", quantiser.quantise, quantise_tiles, inputs)
        yield Case(f"quantiser by rows, {rows}x{width}", quantiser.quantise_rows, quantise_rows, inputs)
        yield Case(
            f"quantiser of GELU by rows, {rows}x{width}",
            lambda x: quantiser.quantised_rows(GELU_QUANTISE_ROWS, x, torch.int8),
            lambda x: quantise_rows(F.gelu(x, approximate="tanh")),
            inputs,
            ulp=2**18,
            steps=2e-3,
        )
        if sm >= FIRST_FP8_SM:
            run, expected = (partial(each, dtype=FP8) for each in (quantiser.quantise_rows, quantise_rows))
            yield Case(f"quantiser by rows to e4m3, {rows}x{width}", run, expected, inputs)


# Linears.


def tile_weight(outputs: int, inputs: int, seed: int, dtype: torch.dtype) -> Weight:
    return Weight(*quantise_tiles(0.05 * randn(outputs, inputs, seed=seed)), randn(outputs, seed=seed + 1, dtype=dtype))


def row_weight(outputs: int, inputs: int, seed: int, dtype: torch.dtype) -> Weight:
    return Weight(*quantise_rows(0.05 * randn(outputs, inputs, seed=seed)), randn(outputs, seed=seed + 1, dtype=dtype))


Scheme = tuple[str, Callable[..., Weight], Callable[[Tensor], tuple[Tensor, Tensor]]]
"""A name, what makes weights, and the quantiser's definition."""
TILES: Scheme = ("tiles", tile_weight, quantise_tiles)
ROWS: Scheme = ("rows", row_weight, quantise_rows)


def products(scheme: Scheme, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """The linears: with one to three weights, with GELU and a quantised output, and added to a residual."""
    name, weight, quantise = scheme

    def packed(x: Tensor) -> quantiser.Quantised:
        return quantiser.Quantised(*quantise(x))

    for rows, outputs, inputs, count in sizes.linears:

        def several(
            rows: int = rows, outputs: int = outputs, inputs: int = inputs, count: int = count
        ) -> tuple[Any, ...]:
            x = randn(rows, inputs, seed=7, dtype=dtype)
            return packed(x), tuple(weight(outputs, inputs, 10 * i, dtype) for i in range(count)), x

        yield Case(
            f"linear by {name}, {rows}x{outputs}x{inputs}, {count} weights",
            lambda q, weights, x: linears(q, weights),
            lambda q, weights, x: [w8a8_linear(x, *each) for each in weights],
            several,
            ulp=2,  # the sum before the bias and the sum with it may each round to the other side
        )
    for rows, outputs, inputs in sizes.epilogues:

        def one(rows: int = rows, outputs: int = outputs, inputs: int = inputs) -> tuple[Any, ...]:
            x, residual = randn(rows, inputs, seed=7, dtype=dtype), randn(rows, outputs, seed=5, dtype=dtype)
            return packed(x), weight(outputs, inputs, 3, dtype), residual, randn(outputs, seed=6), x

        yield Case(
            f"linear by {name} with GELU, quantised, {rows}x{outputs}x{inputs}",
            lambda q, w, residual, gate, x: linear_gelu(q, loud(w)),
            lambda q, w, residual, gate, x: quantise(F.gelu(w8a8_linear(x, *loud(w)), approximate="tanh")),
            one,
            ulp=2**18,  # the scale is a rounded value of the 16-bit type, which may be the next one
            steps=1e-3,
        )
        yield Case(
            f"linear by {name} added to a residual, {rows}x{outputs}x{inputs}",
            lambda q, w, residual, gate, x: [linear_residual(q, w, residual, gate, residual)],
            lambda q, w, residual, gate, x: [gated_residual(residual[None], w8a8_linear(x, *w)[None], gate[None])[0]],
            one,
            ulp=3,
        )
        for way, written in (("", lambda q, w, *_: measured_linear(q, w)), (" added to a residual", added)):
            yield Case(
                f"moments of a linear by {name}{way}, {rows}x{outputs}x{inputs}",
                lambda q, w, residual, gate, x, written=written: off(written(q, w, residual, gate)),
                lambda q, w, residual, gate, x: [torch.ones(2, w.steps_NK.shape[0] // HEAD, len(x))],
                one,
                ulp=64,  # sums of 128 in another order
            )


def loud(w: Weight) -> Weight:
    """A weight with a larger bias. Where few rows of a tile exist, those beyond, which have the bias alone, then change
    its largest magnitude if a kernel does not leave them out."""
    return w._replace(bias_N=8 * w.bias_N)


def added(q: quantiser.Quantised, w: Weight, residual: Tensor, gate: Tensor) -> KnownRows:
    rows = unmeasured(residual)
    linear_residual(q, w, residual, gate, *rows)
    return rows


# Norms and the residual.


def norms(dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    for tokens, width in sizes.normed:

        def inputs(tokens: int = tokens, width: int = width) -> tuple[Tensor, ...]:
            return hidden(tokens, width, dtype), *randn(2, width, seed=2)

        def angles(tokens: int = tokens, width: int = width) -> tuple[Tensor, ...]:
            angle = 100 * randn(tokens, 64, seed=4)
            y = hidden(tokens, width, dtype).flip(0)
            return hidden(tokens, width, dtype), y, *randn(2, width, seed=2), angle.cos(), angle.sin()

        yield Case(
            f"layer norm, {tokens}x{width}",
            lambda x, g, o: [norm(x, g, o, EPS, modulated=False)],
            lambda x, g, o: [layer_norm(x, g, o, EPS)],
            inputs,
            ulp=2,
        )
        yield Case(
            f"modulated layer norm, {tokens}x{width}",
            lambda x, g, o: [norm(x, g, o, EPS, modulated=True)],
            lambda x, g, o: [modulated_norm(x[None], o[None], g[None], EPS)[0]],
            inputs,
            ulp=4,  # a norm that rounds to the other side is multiplied by up to 4 and may be cancelled by its offset
        )
        for known, rows in (("", KnownRows), (" of known moments", measured)):
            yield Case(
                f"modulated layer norm{known}, quantised, {tokens}x{width}",
                lambda x, g, o, rows=rows: norm_quantised(rows(x), Affine(g, o, EPS, True, False)),
                lambda x, g, o: quantise_tiles(modulated_norm(x[None], o[None], g[None], EPS)[0]),
                inputs,
                ulp=2**18,
                steps=2e-3,
            )
        yield Case(
            f"modulated layer norm, quantised by rows, {tokens}x{width}",
            lambda x, g, o: norm_quantised_rows(x, Affine(g, o, EPS, True, False), torch.int8),
            lambda x, g, o: quantise_rows(modulated_norm(x[None], o[None], g[None], EPS)[0]),
            inputs,
            ulp=2**18,
            steps=2e-3,
        )
        # A norm within a float32 sum's error of a tie is one unit away in a few of a million elements. Where the other
        # channel of the pair cancels most of it, that is several units of the result.
        yield Case(f"RMS norm and rotation of two, {tokens}x{width}", rotated, expected_rotated, angles, ulp=4)
        yield Case(
            f"moments of rows, {tokens}x{width}",
            lambda x, g, o: [each for each in measured(x)[1:] if each is not None],
            lambda x, g, o: [row_moments(x)],
            inputs,
            ulp=32,  # sums of 128 float32 in another order
        )
    for tokens, width in sizes.added:

        def addends(tokens: int = tokens, width: int = width) -> tuple[Tensor, ...]:
            x, y = (randn(tokens, width, seed=seed, dtype=dtype) for seed in (5, 6))
            return x, y, randn(width, seed=7)

        yield Case(
            f"gated residual, {tokens}x{width}",
            lambda x, y, g: [add_gated(x, y, g, x)],
            lambda x, y, g: [gated_residual(x[None], y[None], g[None])[0]],
            addends,
        )
    for shape in sizes.joined:
        for is_folded in (False, True):
            yield convolved(shape, is_folded, dtype)
        yield rounded_input(shape, dtype)


def convolutions(sm: int, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """Convolutions in int8. Those of two frames at a time are products of 64 rows, which the machine does not know of
    sm_100."""
    for size in sizes.convolved:
        if sm == 100 and size[0] % 2 == 0:
            continue
        for has_residual in (False, True):
            yield convolved_in_int8(size, has_residual, dtype)


def rounded_input(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    """The input of a convolution of the VAE in int8."""

    def inputs() -> tuple[Tensor, ...]:
        past = torch.full((PAST, *shape[1:]), 7, dtype=torch.int8)
        return randn(*shape, seed=1, dtype=dtype), 1 + 0.2 * randn(shape[3], seed=3), past

    def run(x: Tensor, gain: Tensor, past: Tensor) -> list[Tensor]:
        history = History(past, torch.empty_like(past))
        return [channel_norm.normed(Stream(x), gain, history, steps_C=steps_per_unit(gain))[0], history.kept_PHWC]

    def expected(x: Tensor, gain: Tensor, past: Tensor) -> list[Tensor]:
        activated = F.silu(norm_of_channels(x.flatten(0, 2), gain))
        joined = torch.cat((past, channel_steps(activated, gain).view(shape)))
        return [joined, joined[-PAST:]]

    # A norm that rounds to the other side may be a step away.
    return Case(f"input of a convolution in int8, {'x'.join(map(str, shape))}", run, expected, inputs, steps=2e-2)


def convolved_in_int8(size: tuple[int, int, int, int, int], has_residual: bool, dtype: torch.dtype) -> Case:
    """A convolution of the VAE in int8."""
    frames, rows, columns, ins, outs = size

    def inputs() -> tuple[Tensor, ...]:
        x, weight = (
            (40 * randn(*shape, seed=seed)).clamp(-127, 127).to(torch.int8)
            for seed, shape in ((1, (PAST + frames, rows, columns, ins)), (2, (outs, ins, 3, 3, 3)))
        )
        scale, bias = 1e-4 * (1 + randn(outs, seed=3).abs()), randn(outs, seed=4)
        return x, weight, scale, bias, randn(frames, rows, columns, outs, seed=5, dtype=dtype)

    def run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor) -> list[Tensor]:
        given = ConvolutionWeight(taps_last(weight), scale, bias)
        return [convolve(x, given, dtype, residual if has_residual else None)]

    def expected(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor) -> list[Tensor]:
        y = int8_convolution(x[None].movedim(-1, 1), weight, scale, bias)[0].movedim(0, -1).to(dtype)
        return [y + residual if has_residual else y]

    name = f"convolution in int8, {'x'.join(map(str, size))}{', residual' * has_residual}"
    # The bias may be added in one rounding with the product.
    return Case(name, run, expected, inputs, ulp=1)


def convolved(shape: tuple[int, int, int, int], is_folded: bool, dtype: torch.dtype) -> Case:
    """The input of a convolution of the VAE, with and without frames of the past, norms and a branch."""
    frames, rows, columns, channels = shape
    folded = (frames, rows // 2 + 1, columns // 2 + 1, 4, channels)

    def inputs() -> tuple[Tensor, ...]:
        x = randn(*(folded if is_folded else shape), seed=1, dtype=dtype)
        return x, randn(*shape, seed=2, dtype=dtype), randn(channels, seed=3), randn(2, *shape[1:], seed=4, dtype=dtype)

    def run(x: Tensor, branch: Tensor, gain: Tensor, past: Tensor) -> list[Tensor]:
        later, first = (History(each, torch.empty(past.shape, dtype=dtype)) for each in (past, None))
        activated, after = channel_norm.normed(Stream(x, branch), gain, later)
        plain, _ = channel_norm.normed(Stream(x), gain, activates=False)
        joined = channel_norm.joined(Stream(x), first)
        return [channel_norm.summed(after), activated, later.kept_PHWC, plain, joined, first.kept_PHWC]

    def expected(x: Tensor, branch: Tensor, gain: Tensor, past: Tensor) -> list[Tensor]:
        whole = unfolded(x.flatten(3).movedim(-1, 1)).movedim(1, -1) if is_folded else x
        total, zeros = whole + branch, torch.zeros_like(past)
        norms = (norm_of_channels(each.flatten(0, 2), gain).view(shape) for each in (total, whole))
        activated, joined = torch.cat((past, F.silu(next(norms)))), torch.cat((zeros, whole))
        return [total, activated, activated[-PAST:], next(norms), joined, joined[-PAST:]]

    kind = "doubled " if is_folded else ""
    # A norm that rounds to the other side is a unit away.
    return Case(f"input of a convolution, {kind}{'x'.join(map(str, shape))}", run, expected, inputs, ulp=2)


def rotated(x: Tensor, y: Tensor, x_gain: Tensor, y_gain: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    rms_norm_rotate([x, y], [x_gain, y_gain], EPS, (cos, sin))
    return [x, y]


def expected_rotated(x: Tensor, y: Tensor, x_gain: Tensor, y_gain: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    return [
        rotate(rms_norm(each, gain, EPS)[None].unflatten(-1, (-1, HEAD)), cos, sin).flatten(2)[0]
        for each, gain in ((x, x_gain), (y, y_gain))
    ]


# Attention.


def attentions(blocks: Blocks, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    for size in sizes.attended:
        yield attended(size, blocks, dtype)
    for size in sizes.keys:
        yield keys_of(size, blocks, dtype)
    for size in sizes.packed:
        yield packed(size, blocks, dtype)


def attention_inputs(size: Attended, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values whose rows are strided, and a projection with its bias. The keys have a mean."""
    q, k, v = (randn(size.tokens, size.heads * HEAD + 16, seed=seed, dtype=dtype)[:, 16:] for seed in (1, 2, 3))
    k += randn(size.heads * HEAD, seed=4).to(dtype)
    return q, k, v, randn(HEAD, HEAD, seed=5) / 11, randn(HEAD, seed=6)


def attended(size: Attended, blocks: Blocks, dtype: torch.dtype) -> Case:
    """Attention, compared for some query blocks; the result of each depends on all keys and values."""
    queries = size.queries or range(-(-size.tokens // blocks.q))
    rows = torch.cat([torch.arange(size.tokens)[i * blocks.q : (i + 1) * blocks.q] for i in queries])

    def run(q: Tensor, k: Tensor, v: Tensor, proj: Tensor, bias: Tensor) -> list[Tensor]:
        y = attention.sparse_linear_attention(q, k, v, size.selected, proj, bias, blocks)
        return [y if y.is_meta else y[rows]]

    def expected(q: Tensor, k: Tensor, v: Tensor, proj: Tensor, bias: Tensor) -> list[Tensor]:
        heads = [x[None].unflatten(-1, (-1, HEAD)) for x in (q[rows], k, v)]
        y = reference.sparse_linear_attention(heads[0], heads[1], heads[2], size.selected, proj, bias, blocks)
        return [y.flatten(2)[0]]

    return Case(
        f"attention {blocks.arithmetic}, {size}",
        run,
        expected,
        lambda: attention_inputs(size, dtype),
        # The reference rounds four times where the kernel rounds once, and keys or probabilities may be a step away. A
        # step of fp8 does not shrink with the unit of float16.
        ulp=64 if blocks.arithmetic == "sage_fp8" and dtype == torch.float16 else 8,
        only={"attention": size.queries} if size.queries else {},
    )


def keys_of(size: Attended, blocks: Blocks, dtype: torch.dtype) -> Case:
    """What attention computes of keys and values: their 8 bits, their means, and the state of the linear branch."""

    def run(q: Tensor, k: Tensor, v: Tensor, proj: Tensor, bias: Tensor) -> list[Tensor]:
        keys = attention.prepare_keys(k, v, proj, blocks)
        return [*eight_bit(keys), keys.pooled_HNK, keys.folded_HKK, keys.folded_mass_HK]

    def expected(q: Tensor, k: Tensor, v: Tensor, proj: Tensor, bias: Tensor) -> list[Tensor]:
        return [*eight_bit_reference(k, v, blocks), *shared_reference(k, v, proj, blocks)]

    return Case(
        f"keys and values of attention {blocks.arithmetic}, {size}",
        run,
        expected,
        lambda: attention_inputs(size, dtype),
        ulp=4,
        steps=2e-4,  # the reference multiplies the values by a reciprocal, as upstream does, which rounds twice
    )


def eight_bit(keys: attention.Keys) -> list[Tensor]:
    """The keys in steps and the values in their format, as integers, [H, padded, K] and [H, K, padded]."""
    if keys.k_step is None:
        return []
    values = keys.v.view(torch.int8) if keys.v.dtype == torch.float8_e4m3fn else keys.v
    return [keys.k, keys.k_step, values]


def split(x: Tensor) -> Tensor:
    """Rows of heads side by side as [1, H, L, K]."""
    return x[None].unflatten(-1, (-1, HEAD)).transpose(1, 2)


def eight_bit_reference(k: Tensor, v: Tensor, blocks: Blocks) -> list[Tensor]:
    """The same by the definition."""
    if blocks.arithmetic == "sla":
        return []
    k_BHLK, v_BHLK = split(k), split(v)
    steps, step = reference.quantise_rows(k_BHLK - k_BHLK.mean(2, keepdim=True), blocks.k)
    padding = (0, 0, 0, -len(k) % blocks.k)
    if blocks.arithmetic == "sage_fp16":
        return [steps[0].flatten(1, 2).to(torch.int8), step[0], F.pad(v_BHLK[0].half(), padding)]
    values, _ = reference.quantise_values(v_BHLK)
    codes = F.pad(values[0].float(), padding).to(torch.float8_e4m3fn).view(torch.int8).transpose(1, 2)
    return [steps[0].flatten(1, 2).to(torch.int8), step[0], codes]


def shared_reference(k: Tensor, v: Tensor, proj: Tensor, blocks: Blocks) -> list[Tensor]:
    """The means of key blocks, and the linear branch's sums over all keys, added in float64."""
    k_BHLK, v_BHLK = split(k), split(v)
    phi = torch.softmax(k_BHLK, -1).double()
    state = (phi.transpose(-1, -2) @ v_BHLK.double()).to(k.dtype).double()
    folded = (state @ proj.to(k.dtype).double().T).to(k.dtype)
    means = reference.mean_pool(k_BHLK - k_BHLK.mean(2, keepdim=True), blocks.k)
    return [means[0], folded[0], phi.sum(2).to(k.dtype).float()[0]]


def packed(size: Attended, blocks: Blocks, dtype: torch.dtype) -> Case:
    """The difference between attention that quantises its output and its plain output, quantised by the definition."""

    def run(q: Tensor, k: Tensor, v: Tensor, proj: Tensor, bias: Tensor) -> list[Tensor]:
        y = quantiser.empty_quantised(size.tokens, size.heads * HEAD, q.device)
        attention.sparse_linear_attention_into(y, (q, k, v), size.selected, (proj, bias), blocks)
        expected = attention.sparse_linear_attention(q, k, v, size.selected, proj, bias, blocks)
        steps, scale = quantise_tiles(expected)
        return [y.steps_MK - steps, y.scale - scale]

    def nothing(q: Tensor, *others: Tensor) -> list[Tensor]:
        return [torch.zeros(q.shape, dtype=torch.int8), torch.zeros(-(-size.tokens // HEAD), size.heads)]

    return Case(
        f"attention {blocks.arithmetic}, quantised, {size}", run, nothing, lambda: attention_inputs(size, dtype)
    )


def answered(shape: tuple[int, int, int], dtype: torch.dtype) -> Iterator[Case]:
    """Attention to all keys, with biases of eight bits, one of which leaves its key no weight."""
    tokens, heads, keys = shape
    gain = randn(heads * HEAD, seed=5)

    def inputs() -> tuple[Tensor, ...]:
        q, k, v = (
            randn(rows, heads * HEAD + 16, seed=seed, dtype=dtype)[:, 16:]
            for seed, rows in enumerate((tokens, keys, keys), 1)
        )
        bias = randn(keys, seed=4).bfloat16().float()
        bias[1::7] = -float("inf")
        return q, k, v, bias

    def expected(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> list[Tensor]:
        one, all_k, all_v = (x[None].unflatten(-1, (-1, HEAD)) for x in (q, k, v))
        return [dense_attention(one, all_k, all_v, bias).flatten(2)[0]]

    def normed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> list[Tensor]:
        moments = measured(q).moments_2TL
        assert moments is not None
        return [dense.dense_attention(q, k, v, bias, dense.QueryNorm(moments, gain, EPS))]

    def packed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> list[Tensor]:
        y = quantiser.empty_quantised(tokens, heads * HEAD, q.device)
        dense.dense_attention_into(y, (q, k, v), bias)
        steps, scale = quantise_tiles(dense.dense_attention(q, k, v, bias))
        return [y.steps_MK - steps, y.scale - scale]

    def nothing(q: Tensor, *others: Tensor) -> list[Tensor]:
        return [torch.zeros(q.shape, dtype=torch.int8), torch.zeros(-(-tokens // HEAD), heads)]

    size = f"{tokens} tokens, {heads} heads, {keys} keys"
    # Both round probabilities, at other sizes, and the result.
    yield Case(
        f"attention to all keys, {size}", lambda *given: [dense.dense_attention(*given)], expected, inputs, ulp=4
    )
    yield Case(
        f"attention of normalised queries to all keys, {size}",
        normed,
        lambda q, *others: expected(rms_norm(q, gain, EPS), *others),
        inputs,
        ulp=8,  # a query that rounds to the other side moves a logit by up to a unit of its own type
    )
    yield Case(f"attention to all keys, quantised, {size}", packed, nothing, inputs)


def remembered(form: KVFormat, shape: tuple[int, int, int], dtype: torch.dtype) -> Iterator[Case]:
    """Attention of a chunk to itself and to what is kept of earlier ones, which is read first. There is room for more
    than what is seen."""
    tokens, heads, keys = shape
    room = keys + 5

    def inputs() -> tuple[Tensor, ...]:
        own = (randn(tokens, heads * HEAD, seed=seed, dtype=dtype) for seed in (1, 2, 3))
        past = (randn(1, keys, heads, HEAD, seed=seed, dtype=dtype) for seed in (4, 5))
        angle = 3 * randn(room, HEAD // 2, seed=6)
        return *own, *past, angle.cos(), angle.sin()

    def kept(keys_BPHK: Tensor, values_BPHK: Tensor) -> KeptRows:
        rows = torch.zeros(-(-keys // GROUP) * GROUP, heads * HEAD, dtype=CODES.get(form, dtype))
        if form == "native":
            found = KeptRows(rows, rows.clone())
        else:
            scales = torch.zeros(len(rows) // GROUP, rows.shape[1]), torch.zeros(len(rows), 2 * heads)
            found = KeptRows(rows, rows.clone(), *(scale.to(FP8) for scale in scales))
        keep(found, KeysValues(keys_BPHK, values_BPHK), form)
        return found

    def read(*past: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.zeros(room, heads * HEAD, dtype=dtype), torch.zeros(room, heads * HEAD, dtype=dtype)
        places = torch.arange(room, dtype=torch.int32)
        places[keys:] = -1
        recall_into(out, kept(*past[:2]), places, (past[2], past[3]))
        return out

    def decoded(keys_BPHK: Tensor, values_BPHK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if form != "native":
            keys_BPHK = decode(encode(keys_BPHK, form, "tokens"))
            values_BPHK = decode(encode(values_BPHK, form, "channels"))
        return rotate(keys_BPHK, cos[:keys], sin[:keys]), values_BPHK

    def rows_of(*past: Tensor) -> list[Tensor]:
        return [F.pad(x[0].flatten(1), (0, 0, 0, room - keys)) for x in decoded(*past)]

    def attended(q: Tensor, k: Tensor, v: Tensor, *past: Tensor) -> list[Tensor]:
        bias = torch.zeros(room + tokens)
        bias[keys:room] = -float("inf")
        return [dense.chunk_attention(q, read(*past), dense.Own(k, v), bias)]

    def expected(q: Tensor, k: Tensor, v: Tensor, *past: Tensor) -> list[Tensor]:
        one, own_k, own_v = (x[None].unflatten(-1, (-1, HEAD)) for x in (q, k, v))
        seen = decoded(*past)
        both = (torch.cat(pair, 1) for pair in zip(seen, (own_k, own_v), strict=True))
        return [dense_attention(one, *both).flatten(2)[0]]

    size = f"{form}, {tokens} tokens, {heads} heads, {keys} keys"
    yield Case(
        f"remembered keys and values, {size}", lambda *x: list(read(*x[3:])), lambda *x: rows_of(*x[3:]), inputs, ulp=1
    )
    yield Case(f"attention to remembered keys, {size}", attended, expected, inputs, ulp=4)


def scores(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    queries, heads, keys = shape
    blocks = Blocks(128, 64)

    def expected(q: Tensor, pooled: Tensor) -> list[Tensor]:
        return [(reference.mean_pool(split(q), blocks.q)[0].float() @ pooled.float().transpose(1, 2)).to(dtype)]

    return Case(
        f"scores, {queries} queries, {heads} heads, {keys} key blocks",
        lambda q, pooled: [attention.block_scores(q, pooled, blocks)[..., :keys]],
        expected,
        lambda: (randn(queries, heads * HEAD, seed=1, dtype=dtype), randn(heads, keys, HEAD, seed=2, dtype=dtype)),
        ulp=2,
    )


def ranks(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    """The selection of blocks by scores of which many are equal, some are zero and some are infinite."""
    queries, heads, keys, selected = shape

    def inputs() -> tuple[Tensor]:
        score = (8 * randn(heads, queries, -(-keys // 16) * 16, seed=1)).round().to(dtype)
        score[0, 0, ::7] = -0.0
        score[-1, -1, 1::5] = float("inf")
        return (score,)

    return Case(
        f"selection of {selected} of {keys} key blocks, {queries} query blocks, {heads} heads",
        lambda score: [attention.select_blocks(score, keys, selected)],
        lambda score: [reference.select_blocks(score[None, ..., :keys], selected)[0].int()],
        inputs,
    )


# A whole block.


@cache
def layer_of(model_name: str, recipe_name: str) -> dict[str, Tensor]:
    """The tensors of a layer of TinyWan, by a recipe."""
    model, recipe = load_model(model_name), load_recipe(recipe_name)
    block, prefix = graphs(model, recipe)["block"], "blocks.1."
    with TemporaryDirectory() as folder:
        bundle = import_checkpoint(model, embedded(model), Path(folder) / "bundle", recipe=recipe)
        stored = Weights(bundle).component(block.component(model))
        return {name: stored[prefix + name].clone() for name in block.weights}


def block(model_name: str, recipe_name: str, sm: int, dtype: torch.dtype) -> Case:
    """A layer of a model with all of its kernels, and PyTorch's products where a recipe leaves them to it."""
    model, recipe = load_model(model_name), recipe_for(load_recipe(recipe_name), sm)
    limits, clip = load_limits(recipe, str(dtype).removeprefix("torch.")), model.video.clip
    assert limits is not None
    selected = num_selected(recipe, clip, model.topk)

    def inputs() -> tuple[Any, ...]:
        draw = Draw(1, torch.device("cpu"), dtype)
        return layer_of(model_name, recipe_name), block_inputs(model.dit, draw, clip.grid, 21, selected)

    def run(weights: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        out, moments = torch.empty(inputs[0].shape, dtype=dtype), UNKNOWN
        if passes_moments(recipe):
            moments = StreamMoments(measured(inputs[0][0]).moments_2TL, unmeasured(out[0]).moments_2TL)
        FusedBlock(model.dit, recipe).run(weights, inputs, out, moments)
        return [out]

    def expected(weights: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        with torch.inference_mode():
            return list(graphs(model, recipe)["block"].run(weights, inputs))

    return Case(f"block of {model_name}, {recipe_name}", run, expected, inputs, rms=limits.block.rms)
