"""Moments of rows: the definition against float64, and every kernel that writes them or reads them."""

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_matches
from tests.plugins.kernels import DEVICE, DTYPES, cases, far_apart, randn, rounding_error, strided
from wanforge.errors import ShapeError
from wanforge.plugins.dense_attention.fused import QueryNorm, dense_attention, dense_attention_into
from wanforge.plugins.layer_norm.fused import Affine, norm_quantised
from wanforge.plugins.layer_norm.reference import layer_norm, modulated_norm
from wanforge.plugins.quantiser.fused import empty_quantised, quantise, quantise_rows
from wanforge.plugins.quantiser.reference import quantise_rows as rows_of
from wanforge.plugins.quantiser.reference import quantise_tiles
from wanforge.plugins.rms_norm_rope.reference import rms_norm
from wanforge.plugins.row_moments.fused import KnownRows, measured, unmeasured
from wanforge.plugins.row_moments.reference import row_moments
from wanforge.plugins.w8a8_linear.fused import Weight, linear_residual, linears, measured_linear

pytestmark = pytest.mark.usefixtures("guarded")

EPS = 1e-6
SHAPES = {  # rows, width
    "one row": (1, 128),
    "ragged": (141, 384),
    "whole tiles": (128, 256),
    "Wan 1.3B's width": (37, 1536),
    "Wan 14B's width": (5, 5120),
}


def hidden(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of different magnitudes; the mean of the first is 200 times its deviation."""
    return (randn(rows, width, seed=rows) * torch.linspace(0.01, 30, rows, device=DEVICE)[:, None] + 2).to(dtype)


def known(rows: KnownRows) -> Tensor:
    assert rows.moments_2TL is not None
    return rows.moments_2TL


def assert_are_moments(found: Tensor, x: Tensor) -> None:
    """Errors of means are relative to the rows, and those of sums of squares to the sums."""
    expected = row_moments(x.double()).float()
    scale = x.float().abs().amax(1).clamp_min(1e-30)
    assert ((found[0] - expected[0]).abs() / scale).max() < 1e-6
    assert ((found[1] - expected[1]).abs() <= 2e-5 * expected[1] + 1e-9 * scale.square()).all()


def test_the_definition_gives_the_variance_of_whole_rows() -> None:
    x = hidden(20, 384, torch.float32)
    means, squares = row_moments(x).double()
    mean = means.mean(0)
    variance = (squares.sum(0) + 128 * (means - mean).square().sum(0)) / 384
    assert_matches(mean, x.double().mean(1), 1e-6)
    assert_matches(variance, x.double().var(1, correction=0), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, "one row", "ragged"))
def test_moments_are_those_of_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = strided(hidden(*shape, dtype))
    assert_are_moments(known(measured(x)), x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_by_rows", [False, True], ids=["tiles", "rows"])
def test_linears_write_the_moments_of_what_they_store(is_by_rows: bool, dtype: torch.dtype) -> None:
    x = randn(141, 256, seed=1, dtype=dtype)
    q = quantise_rows(x) if is_by_rows else quantise(x)
    drawn = 0.05 * randn(512, 256, seed=2)  # a multiple of 256 outputs, which kernels in Gluon need
    weight = Weight(*(rows_of if is_by_rows else quantise_tiles)(drawn), randn(512, seed=3, dtype=dtype))
    y = measured_linear(q, weight)
    assert torch.equal(y.x_LD, linears(q, [weight])[0])
    assert_are_moments(known(y), y.x_LD)
    stream = hidden(141, 512, dtype)
    alone = linear_residual(q, weight, stream, randn(512, seed=4), torch.empty_like(stream))
    both = unmeasured(stream)
    linear_residual(q, weight, stream, randn(512, seed=4), *both)
    assert torch.equal(both.x_LD, alone)
    assert_are_moments(known(both), both.x_LD)


@pytest.mark.parametrize("fault", [False, True], ids=["correct", "upstream"])
@pytest.mark.parametrize("modulated", [False, True], ids=["weights", "modulated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, "one row", "ragged"))
def test_a_norm_of_known_moments_is_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, modulated: bool, fault: bool
) -> None:
    """A step is off where a value rounds to it because sums are taken in another order."""
    x, (gain, offset) = strided(hidden(*shape, dtype)), randn(2, shape[1], seed=2)
    found = norm_quantised(measured(x), Affine(gain, offset, EPS, modulated, fault))
    if modulated:
        normed = modulated_norm(x[None], offset[None], gain[None], EPS, padded_variance=fault)[0]
    else:
        normed = layer_norm(x, gain, offset, EPS, padded_variance=fault)
    steps, scale = quantise_tiles(normed)
    # In float32 the first row decides: its mean is 200 times its deviation.
    assert_matches(found.scale, scale, 2e-5 if dtype == torch.float32 else rounding_error(dtype, 0.5))
    apart = (found.steps_MK.int() - steps.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < (1e-3 if dtype == torch.float32 else 1e-2)


def test_a_norm_believes_the_moments_that_it_is_given() -> None:
    x, one = hidden(20, 256, DTYPES[0]), torch.ones(256, device=DEVICE)
    others = KnownRows(x, torch.stack([torch.full((2, 20), 7.0), torch.full((2, 20), 128 * 16.0)]).to(DEVICE))
    found = norm_quantised(others, Affine(one, 0 * one, EPS, False, False))
    steps, scale = quantise_tiles(((x.float() - 7) / 4).to(x.dtype))
    assert_matches(found.scale, scale, rounding_error(DTYPES[0]))
    assert (found.steps_MK.int() - steps.int()).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", cases({"one token": (1, 1, 20), "ragged": (333, 3, 37), "12 heads": (5, 12, 30)}, "one token", "ragged")
)
def test_attention_normalises_its_queries(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, heads, keys = shape
    q = strided(hidden(tokens, heads * 128, dtype))
    k, v = (randn(keys, heads * 128, seed=seed, dtype=dtype) for seed in (2, 3))
    bias, weight = randn(keys, seed=4).bfloat16().float(), randn(heads * 128, seed=5)
    norm = QueryNorm(known(measured(q)), weight, EPS)
    expected = dense_attention(rms_norm(q, weight, EPS), k, v, bias)
    found = dense_attention(q, k, v, bias, norm)
    # The kernel rounds keys times the weight, the reference rounds the queries.
    assert_matches(found, expected, rounding_error(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_normalised_queries_is_quantised(dtype: torch.dtype) -> None:
    q, k, v = (randn(rows, 256, seed=seed, dtype=dtype) for seed, rows in enumerate((133, 37, 37), 1))
    bias, norm = randn(37, seed=4), QueryNorm(known(measured(q)), randn(256, seed=5), EPS)
    y = empty_quantised(133, 256, q.device)
    dense_attention_into(y, (q, k, v), bias, norm)
    steps, scale = quantise_tiles(dense_attention(q, k, v, bias, norm))
    assert_matches(y.steps_MK, steps, 0)
    assert_matches(y.scale, scale, 0)


def test_addresses_are_64_bits_wide() -> None:
    x = randn(133, 128, seed=10, dtype=torch.float16)
    apart, one = far_apart(x), torch.ones(128, device=DEVICE)
    found = measured(apart)
    assert torch.equal(known(found), known(measured(x)))
    affine = Affine(one, one, EPS, False, False)
    assert torch.equal(norm_quantised(found, affine).steps_MK, norm_quantised(measured(x), affine).steps_MK)


def test_rows_past_the_last_one_do_not_count() -> None:
    """Rows past the last one would come out as the offset, the largest of a tile whose own rows come out near zero."""
    sign = torch.ones(128, device=DEVICE)
    sign[::2] = -1
    affine = Affine(-sign, torch.ones_like(sign), EPS, False, False)
    assert norm_quantised(measured(sign.repeat(130, 1)), affine).scale.max() < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    x, one = torch.zeros(20, 256, device=DEVICE), torch.ones(256, device=DEVICE)
    with pytest.raises(ShapeError, match="multiple of 128"):
        measured(x[:, :200])
    affine = Affine(one, one, EPS, False, False)
    for wrong in (torch.zeros(2, 2, 19), torch.zeros(2, 1, 20), torch.zeros(2, 2, 20).double()):
        with pytest.raises(
            ShapeError, match=r"moments of rows \(20, 256\) must be contiguous, \(2, 2, 20\) and float32"
        ):
            norm_quantised(KnownRows(x, wrong.to(DEVICE)), affine)
    with pytest.raises(ShapeError, match="weight"):
        dense_attention(x, x, x, torch.zeros(20, device=DEVICE), QueryNorm(known(measured(x)), one[:128], EPS))
