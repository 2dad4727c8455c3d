"""The kernels of the NVFP4 linear, and those that quantise to NVFP4, against their definitions."""

import pytest
import torch
from torch.nn import functional as F

from tests.numerics import assert_matches, relative_rms
from tests.plugins.kernels import DEVICE, DTYPES, cases, far_apart, randn, rounding_error, strided
from wanforge.configs.tiles import load_tiles
from wanforge.errors import ShapeError
from wanforge.plugins.block_quantiser.fused import FourBitMatrix, empty_four_bits, quantise
from wanforge.plugins.dense_attention.fused import (
    Own,
    chunk_attention,
    chunk_attention_into,
    dense_attention,
    dense_attention_into,
)
from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.layer_norm.fused import Affine, norm, norm_four_bits
from wanforge.plugins.nvfp4_linear import ARCHITECTURES, INPUT_SCALE
from wanforge.plugins.nvfp4_linear.fused import (
    FourBitWeight,
    linear_gelu,
    linear_residual,
    linears,
    measured_linear,
)
from wanforge.plugins.nvfp4_linear.reference import (
    dequantise,
    global_scale_of,
    nvfp4_linear,
    quantise_blocks,
    quantise_weight,
    unpack,
)
from wanforge.plugins.row_moments.fused import KnownRows, unmeasured
from wanforge.plugins.row_moments.reference import row_moments
from wanforge.plugins.sparse_linear_attention.fused import sparse_linear_attention, sparse_linear_attention_into
from wanforge.plugins.sparse_linear_attention.reference import Blocks

pytestmark = pytest.mark.usefixtures("guarded")

SHAPES = {  # rows, outputs, inputs
    "one row": (1, 128, 128),
    "ragged rows": (141, 256, 384),
    "groups of row tiles cut short": (1290, 256, 128),
    "the width of Wan 1.3B": (140, 128, 1536),
}
HALVES = [each for each in DTYPES if each != torch.float32]


def input_scale() -> torch.Tensor:
    return torch.tensor(INPUT_SCALE, device=DEVICE)


def weight(outputs: int, inputs: int, seed: int, dtype: torch.dtype) -> FourBitWeight:
    plain = 0.05 * randn(outputs, inputs, seed=seed)
    global_scale = global_scale_of(plain.abs().amax())
    bias = randn(outputs, seed=seed + 1, dtype=dtype)
    return FourBitWeight(*quantise_weight(plain, global_scale), global_scale, bias)


def quantised(rows: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, FourBitMatrix]:
    x = randn(rows, inputs, seed=7, dtype=dtype)
    return x, FourBitMatrix(*quantise_weight(x, input_scale()))


def assert_quantised(actual: FourBitMatrix, values: torch.Tensor) -> None:
    """Numbers and scales are the reference's to the bit, except for the signs of zeros."""
    numbers, scale = quantise_blocks(values, input_scale())
    assert_matches(unpack(actual.fp4_MP), numbers, 0)
    assert torch.equal(actual.scale_MB.view(torch.uint8), scale.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_quantiser_is_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = strided(3 * randn(shape[0], shape[2], seed=1, dtype=dtype))
    assert_quantised(quantise(x), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 6e-8, 1e-3, 0.0232, 672.0, 6e4, float("inf")], ids=str)
def test_quantiser_takes_zeros_and_saturates(value: float, dtype: torch.dtype) -> None:
    x = randn(130, 256, seed=2, dtype=dtype)
    x[:, 128:] = value
    x[5, 200] = -value
    assert_quantised(quantise(x), x)


def test_what_is_not_a_number_stays_in_its_block() -> None:
    x = randn(3, 128, seed=3)
    x[1, 20] = float("nan")
    y = quantise(x)
    others = [0, *range(2, 8)]
    assert y.scale_MB.float()[1, 1].isnan()
    assert torch.equal(y.scale_MB.float()[1, others], quantise_blocks(x, input_scale())[1].float()[1, others])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_quotient_of_16_bits_is_rounded_as_the_reference_does(dtype: torch.dtype) -> None:
    """All positive numbers of a type, by every scale that there is: the largest of a block decides its scale."""
    positive = torch.arange(1, 1 << 15, dtype=torch.int16).view(dtype)
    finite = positive[positive.isfinite() & (positive <= 680)].to(DEVICE)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for largest in (1.5 * scales).to(dtype).to(DEVICE):
        below = finite[(finite <= largest) & (finite > largest / 64)]
        x = F.pad(below, (0, -len(below) % 120), value=0.0).view(-1, 8, 15)
        x = torch.cat([x, largest.expand(len(x), 8, 1)], 2).flatten(1)
        assert_quantised(quantise(x), x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_largest_magnitude_of_16_bits_has_the_scale_of_the_reference(dtype: torch.dtype) -> None:
    positive = torch.arange(1 << 15, dtype=torch.int16).view(dtype)
    x = torch.zeros(len(positive) // 8, 8, 16, dtype=dtype)
    x[:, :, 3] = torch.where(positive.isfinite(), positive, 1.0).view(-1, 8)
    assert_quantised(quantise(x.flatten(1).to(DEVICE)), x.flatten(1).to(DEVICE))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, "one row", "ragged rows"))
def test_linears_are_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, count: int) -> None:
    rows, outputs, inputs = shape
    x, q = quantised(rows, inputs, dtype)
    weights = [weight(outputs, inputs, 10 * i, dtype) for i in range(count)]
    for y, w in zip(linears(q, weights), weights, strict=True):
        assert_matches(y, nvfp4_linear(x, *w), rounding_error(dtype, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_quantiser_ride_in_the_epilogue(dtype: torch.dtype) -> None:
    x, q = quantised(333, 256, dtype)
    w = weight(384, 256, 3, dtype)
    y = linear_gelu(q, w)
    expected = F.gelu(nvfp4_linear(x, *w), approximate="tanh")
    numbers, scale = quantise_blocks(expected, input_scale())
    # The kernel sums in another order and computes GELU with another function, so a few values round to a neighbour.
    assert (unpack(y.fp4_MP) != numbers).float().mean() < (1e-4 if dtype == torch.float32 else 2e-3)
    assert (y.scale_MB.float() != scale.float()).float().mean() < (1e-3 if dtype == torch.float32 else 1e-2)
    restored = dequantise(y.fp4_MP, y.scale_MB, input_scale())
    assert relative_rms(restored, dequantise(*quantise_weight(expected, input_scale()), input_scale())) < 0.02


@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_residual_rides_in_the_epilogue(dtype: torch.dtype, in_place: bool, has_gate: bool) -> None:
    x, q = quantised(333, 256, dtype)
    w, residual = weight(128, 256, 4, dtype), randn(333, 128, seed=5, dtype=dtype)
    gate = randn(128, seed=6) if has_gate else None
    ones = torch.ones(1, 128, device=DEVICE)
    expected = gated_residual(residual[None], nvfp4_linear(x, *w)[None], ones if gate is None else gate[None])[0]
    before = residual.clone()
    out = residual if in_place else torch.empty(333, 128, dtype=dtype, device=DEVICE)
    linear_residual(q, w, residual, gate, KnownRows(out))
    assert_matches(out, expected, rounding_error(dtype, 0.1))
    assert in_place or torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_ride_in_the_epilogue(dtype: torch.dtype) -> None:
    x, q = quantised(141, 256, dtype)
    w = weight(256, 256, 8, dtype)
    y = measured_linear(q, w)
    assert_matches(y.x_LD, nvfp4_linear(x, *w), rounding_error(dtype, 0.1))
    assert y.moments_2TL is not None
    assert_matches(y.moments_2TL, row_moments(y.x_LD), 1e-6)
    out = unmeasured(torch.empty_like(y.x_LD))
    linear_residual(q, w, x, None, out)
    assert out.moments_2TL is not None
    assert_matches(out.moments_2TL, row_moments(out.x_LD), 1e-6)


@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (141, 384), (7, 5120)], ids=str)
def test_norm_is_quantised_in_its_launch(shape: tuple[int, int], dtype: torch.dtype, modulated: bool) -> None:
    x = strided(randn(*shape, seed=1, dtype=dtype) + 0.5)
    affine = Affine(0.2 * randn(shape[1], seed=2), randn(shape[1], seed=3), 1e-6, modulated, False)
    y = norm_four_bits(x, affine)
    plain = norm(x, *affine[:3], modulated=modulated)
    numbers, _ = quantise_blocks(plain, input_scale())
    # Both kernels find the mean by different sums.
    assert (unpack(y.fp4_MP) != numbers).float().mean() < 2e-3
    expected = dequantise(*quantise_weight(plain, input_scale()), input_scale())
    assert relative_rms(dequantise(y.fp4_MP, y.scale_MB, input_scale()), expected) < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_to_a_text_is_quantised_in_its_launch(dtype: torch.dtype) -> None:
    q, k, v = (randn(rows, 256, seed=seed, dtype=dtype) for seed, rows in enumerate((141, 20, 20)))
    bias = randn(20, seed=4)
    y = empty_four_bits(141, 256, q.device)
    dense_attention_into(y, (q, k, v), bias)
    assert_quantised(y, dense_attention(q, k, v, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_to_a_chunk_is_quantised_in_its_launch(dtype: torch.dtype) -> None:
    q, k, v, own_k, own_v = (randn(70, 128, seed=seed, dtype=dtype) for seed in range(5))
    bias, own = randn(140, seed=6), Own(own_k, own_v)
    y = empty_four_bits(70, 128, q.device)
    chunk_attention_into(y, (q, k, v), own, bias)
    assert_quantised(y, chunk_attention(q, (k, v), own, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [128, 64])
def test_sparse_attention_is_quantised_in_its_launch(rows: int, dtype: torch.dtype) -> None:
    blocks = Blocks(rows, 64, "sage_fp8")
    qkv = (
        randn(200, 256, seed=1, dtype=dtype),
        randn(200, 256, seed=2, dtype=dtype),
        randn(200, 256, seed=3, dtype=dtype),
    )
    projection = 0.1 * randn(128, 128, seed=4, dtype=dtype), randn(128, seed=5, dtype=dtype)
    y = empty_four_bits(200, 256, qkv[0].device)
    sparse_linear_attention_into(y, qkv, 2, projection, blocks)
    assert_quantised(y, sparse_linear_attention(*qkv, 2, *projection, blocks))


def test_rows_beyond_2_to_the_31_elements() -> None:
    x = far_apart(randn(130, 128, seed=4))
    assert_quantised(quantise(x), x)


def test_refuses_tensors_that_do_not_fit() -> None:
    _, q = quantised(8, 256, torch.float32)
    with pytest.raises(ShapeError, match="do not fit packed x"):
        linears(q, [weight(128, 128, 1, torch.float32)])
    with pytest.raises(ShapeError, match="N and K multiples of 128"):
        linears(q, [weight(48, 256, 1, torch.float32)])
    with pytest.raises(ShapeError, match="rows must be contiguous"):
        quantise(randn(4, 96, seed=1))
    with pytest.raises(ShapeError, match="the output must be contiguous"):
        linears(q, [weight(128, 256, 1, torch.float32)], torch.empty(7, 128))


def test_the_tiles_are_those_of_the_architectures_with_kernels() -> None:
    """Besides them there are only those of the interpreter."""
    for kernel in ("nvfp4_linear.gemm", "block_quantiser.quantise"):
        assert {sm for row in load_tiles()[kernel] for sm in row.sms} == {80, *ARCHITECTURES}
