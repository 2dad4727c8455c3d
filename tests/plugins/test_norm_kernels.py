"""The kernels of layer norm, RMS norm with rotation and gated residual against their definitions."""

import pytest
import torch

from tests.numerics import assert_matches
from tests.plugins.kernels import DEVICE, DTYPES, cases, far_apart, randn, rounding_error, strided
from wanforge.errors import ShapeError
from wanforge.plugins.gated_residual.fused import add_gated
from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.layer_norm.fused import Affine, norm, norm_quantised, norm_quantised_rows
from wanforge.plugins.layer_norm.reference import layer_norm, modulated_norm
from wanforge.plugins.quantiser.reference import quantise_rows, quantise_tiles
from wanforge.plugins.rms_norm_rope.fused import rms_norm_rotate
from wanforge.plugins.rms_norm_rope.reference import rms_norm, rotate
from wanforge.plugins.row_moments.fused import KnownRows

pytestmark = pytest.mark.usefixtures("guarded")

EPS = 1e-6
SHAPES = {  # tokens, width
    "one token": (1, 128),
    "ragged": (141, 384),
    "whole tiles": (128, 256),
    "Wan 1.3B's 12 heads": (37, 1536),
    "Wan 14B's 40 heads": (5, 5120),
}


def hidden(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of different magnitudes, one of them constant."""
    x = randn(tokens, width, seed=tokens) * torch.linspace(0.01, 30, tokens, device=DEVICE)[:, None] + 2
    x[tokens // 2] = 0.5
    return x.to(dtype)


@pytest.mark.parametrize("fault", [False, True], ids=["correct", "upstream"])
@pytest.mark.parametrize("modulated", [False, True], ids=["weights", "modulated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, "one token", "ragged"))
def test_layer_norm_is_the_reference(shape: tuple[int, int], dtype: torch.dtype, modulated: bool, fault: bool) -> None:
    x = strided(hidden(*shape, dtype))
    # One of the six rows of a modulation, as the network passes it.
    gain, offset = randn(2, 6, shape[1], seed=1)[:, 3]
    if modulated:
        expected = modulated_norm(x[None], offset[None], gain[None], EPS, padded_variance=fault)[0]
    else:
        expected = layer_norm(x, gain, offset, EPS, padded_variance=fault)
    actual = norm(x, gain, offset, EPS, modulated=modulated, padded_variance=fault)
    constant = shape[0] // 2
    keep = torch.arange(shape[0], device=DEVICE) != constant
    if keep.any():
        # A few values may round to the other side because sums are taken in another order. In float32 the first row
        # decides: its mean is 200 times its deviation.
        bound = 2e-5 if dtype == torch.float32 else rounding_error(dtype, 0.5)
        assert_matches(actual[keep], expected[keep], bound)
    # Both results of a constant row are the rounding error of its mean over sqrt(eps).
    assert (actual[constant].float() - expected[constant].float()).abs().max() < 2e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_is_quantised_in_the_same_pass(dtype: torch.dtype) -> None:
    x, (gain, offset) = hidden(141, 384, dtype), randn(2, 384, seed=2)
    y = norm_quantised(KnownRows(x), Affine(gain, offset, EPS, True, False))
    steps, scale = quantise_tiles(norm(x, gain, offset, EPS, modulated=True))
    assert_matches(y.steps_MK, steps, 0)
    assert_matches(y.scale, scale, 0)


@pytest.mark.parametrize("steps_of", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("fault", [False, True], ids=["correct", "upstream"])
@pytest.mark.parametrize("modulated", [False, True], ids=["weights", "modulated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES | {"ragged pieces": (9, 896)}, "one token", "ragged"))
def test_layer_norm_is_quantised_by_rows(
    shape: tuple[int, int], dtype: torch.dtype, modulated: bool, fault: bool, steps_of: torch.dtype
) -> None:
    """What a step is off where sums in another order round to it is a share of the row's largest magnitude."""
    x, (gain, offset) = strided(hidden(*shape, dtype)), randn(2, shape[1], seed=2)
    x[shape[0] // 2] = x[0]  # of a constant row, rounding errors would be compared
    found = norm_quantised_rows(x, Affine(gain, offset, EPS, modulated, fault), steps_of)
    if modulated:
        normed = modulated_norm(x[None], offset[None], gain[None], EPS, padded_variance=fault)[0]
    else:
        normed = layer_norm(x, gain, offset, EPS, padded_variance=fault)
    expected = quantise_rows(normed, steps_of)
    bound = 2e-5 if dtype == torch.float32 else rounding_error(dtype, 0.5)
    assert_matches(found.scale, expected[1], bound)
    assert (found.steps_MK.float() != expected[0].float()).float().mean() < (1e-3 if dtype == torch.float32 else 1e-2)
    step = 1.0 if steps_of == torch.int8 else 32.0
    assert (found.steps_MK.float() - expected[0].float()).abs().max() <= step


def test_rows_past_the_last_one_do_not_count() -> None:
    """Rows past the last one would come out as the offset, the largest of a tile whose own rows come out near zero."""
    sign = torch.ones(128, device=DEVICE)
    sign[::2] = -1
    y = norm_quantised(KnownRows(sign.repeat(130, 1)), Affine(-sign, torch.ones_like(sign), EPS, False, False))
    assert y.scale.max() < 1e-6


@pytest.mark.parametrize("turned", [True, False], ids=["rotated", "plain"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, "one token", "ragged"))
def test_rms_norm_and_rotation_are_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, count: int, turned: bool
) -> None:
    tokens, width = shape
    both = torch.stack([hidden(tokens, width, dtype) + i for i in range(2)], 1)
    tensors, weights = list(both.unbind(1))[:count], list(randn(2, width, seed=3))[:count]
    angle = 100 * randn(tokens, 64, seed=4)
    angles = (angle.cos(), angle.sin()) if turned else None
    expected = []
    for x, weight in zip(tensors, weights, strict=True):
        y = rms_norm(x, weight, EPS)
        expected.append(rotate(y[None].unflatten(-1, (-1, 128)), *angles).flatten(2)[0] if angles else y)
    untouched = both[:, count:].clone()
    rms_norm_rotate(tensors, weights, EPS, angles)
    for x, y in zip(tensors, expected, strict=True):
        assert_matches(x, y, rounding_error(dtype, 0.5))
    assert torch.equal(both[:, count:], untouched)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, "one token", "ragged"))
def test_the_second_tensor_is_also_kept_before_it_is_rotated(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tokens, width = shape
    tensors, gains = [randn(*shape, seed=seed, dtype=dtype) for seed in (1, 2)], list(randn(2, width, seed=3))
    angle = randn(tokens, 64, seed=4)
    angles = angle.cos(), angle.sin()
    expected = rms_norm(tensors[1], gains[1], EPS)
    alone = [x.clone() for x in tensors]
    rms_norm_rotate(alone, gains, EPS, angles)
    plain = torch.full_like(tensors[1], float("nan"))
    rms_norm_rotate(tensors, gains, EPS, angles, plain)
    assert_matches(plain, expected, rounding_error(dtype, 0.5))
    assert all(torch.equal(*each) for each in zip(tensors, alone, strict=True))


@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, "one token", "ragged"))
def test_gated_residual_is_the_reference_to_the_bit(
    shape: tuple[int, int], dtype: torch.dtype, in_place: bool, has_gate: bool
) -> None:
    x, y = randn(*shape, seed=5, dtype=dtype), strided(randn(*shape, seed=6, dtype=dtype))
    gate = randn(shape[1], seed=7) if has_gate else None
    ones = torch.ones(shape[1], device=DEVICE)
    expected = gated_residual(x[None], y[None], (ones if gate is None else gate)[None])[0]
    out = x if in_place else torch.empty(shape, dtype=dtype, device=DEVICE)
    add_gated(x, y, gate, out)
    assert_matches(out, expected, 0)


def test_addresses_are_64_bits_wide() -> None:
    x, (gain, offset) = randn(133, 128, seed=9, dtype=torch.float16), randn(2, 128, seed=10)
    apart = far_apart(x)
    near = norm(x, gain, offset, EPS, modulated=True)
    assert torch.equal(norm(apart, gain, offset, EPS, modulated=True), near)
    assert torch.equal(add_gated(x, apart, gain, torch.empty_like(x)), add_gated(x, x, gain, torch.empty_like(x)))
    rms_norm_rotate([apart], [gain], EPS)
    rms_norm_rotate([x], [gain], EPS)
    assert torch.equal(apart, x)


def test_runs_are_identical() -> None:
    x, (gain, offset) = hidden(141, 384, DTYPES[1]), randn(2, 384, seed=8)
    first, second = (norm(x, gain, offset, EPS, modulated=True) for _ in range(2))
    assert torch.equal(first, second)


def test_what_does_not_fit_is_refused() -> None:
    x, gain = torch.zeros(4, 256, device=DEVICE), torch.zeros(256, device=DEVICE)
    with pytest.raises(ShapeError, match="do not fit"):
        norm(x, gain[:128], gain, EPS, modulated=True)
    with pytest.raises(ShapeError, match="do not fit"):
        norm(torch.zeros(256, 4, device=DEVICE).T, gain, gain, EPS, modulated=True)
    with pytest.raises(ShapeError, match="do not fit"):
        rms_norm_rotate([x], [gain[:128]], EPS)
    with pytest.raises(ShapeError, match="before its rotation"):
        rms_norm_rotate([x, x], [gain, gain], EPS, plain_LD=x[:2])
    with pytest.raises(ShapeError, match="64 angles"):
        rms_norm_rotate([x], [gain], EPS, (torch.zeros(4, 32, device=DEVICE),) * 2)
    with pytest.raises(ShapeError, match="do not fit"):
        add_gated(x, x[:2], None, x)
