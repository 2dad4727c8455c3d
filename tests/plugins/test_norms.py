"""Layer norm, RMS norm, rotation and gated residual against upstream's recorded values and PyTorch in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests import golden
from tests.numerics import assert_matches, relative_rms
from wanforge.plugins.gated_residual.reference import gated_residual
from wanforge.plugins.layer_norm.reference import layer_norm, modulated_norm, normalise
from wanforge.plugins.rms_norm_rope.reference import rms_norm, rotate

EPS = 1e-6
# In bfloat16, with a spacing of 2^-8, at most a few elements may round to the other side.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-4}


def recorded(name: str, which: str, dtype: torch.dtype) -> tuple[golden.Case, Tensor, str]:
    case = golden.load(name)
    suffix = "f32" if dtype == torch.float32 else "bf16"
    return case, case["input:x"].to(dtype), f"output:{which}_{suffix}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fault", [False, True], ids=["correct", "fast"])
@pytest.mark.parametrize("name", ["norm_d1536", "norm_d256"])
def test_layer_norm_equals_the_recorded_values(name: str, fault: bool, dtype: torch.dtype) -> None:
    which = "fast_layernorm" if fault else "correct_layernorm"
    case, x, key = recorded(name, which, dtype)
    weight, bias = case["input:weight_f32"], case["input:bias_f32"]
    plain = normalise(x, EPS, padded_variance=fault).to(dtype)
    affine = layer_norm(x, weight, bias, EPS, padded_variance=fault)
    # The last row is constant: its normalised value is rounding noise over sqrt(eps), so it is compared separately.
    for actual, expected in ((plain, case[key]), (affine, case[key.replace("norm_", "norm_affine_")])):
        assert_matches(actual[:, :-1], expected[:, :-1], TOLERANCE[dtype])
        assert float((actual[:, -1].float() - expected[:, -1].float()).abs().max()) < 5e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["norm_d1536", "norm_d256"])
def test_rms_norm_equals_the_recorded_values(name: str, dtype: torch.dtype) -> None:
    case, x, key = recorded(name, "fast_rmsnorm", dtype)
    assert_matches(rms_norm(x, case["input:weight_f32"], EPS), case[key], TOLERANCE[dtype])


def test_the_fault_shows_only_where_the_width_is_no_power_of_two() -> None:
    x = torch.randn(4, 384) + 3
    assert relative_rms(normalise(x, EPS, padded_variance=True), normalise(x, EPS)) > 0.1
    x = torch.randn(4, 512) + 3
    assert relative_rms(normalise(x, EPS, padded_variance=True), normalise(x, EPS)) < 1e-6


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(2, 300),
    rows=st.integers(1, 9),
    magnitude=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 9999),
)
def test_modulated_norm_matches_float64(width: int, rows: int, magnitude: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, width, generator=generator) * magnitude
    shift, scale = torch.randn(2, 2, width, generator=generator)
    expected = F.layer_norm(x.double(), (width,), eps=EPS) * (1 + scale[:, None].double()) + shift[:, None].double()
    # Two nearly equal values lose their common digits before they are divided by their difference.
    assert_matches(modulated_norm(x, shift, scale, EPS).double(), expected, 1e-3 if width < 4 else 1e-5)


def test_modulated_norm_rounds_before_it_modulates() -> None:
    x = torch.randn(1, 5, 256).to(torch.bfloat16)
    shift, scale = torch.randn(2, 1, 256)
    rounded = F.layer_norm(x.float(), (256,), eps=EPS).to(torch.bfloat16).float()
    assert_matches(modulated_norm(x, shift, scale, EPS), (rounded * (1 + scale) + shift).to(torch.bfloat16), 0)


def test_each_sample_takes_its_own_modulation() -> None:
    x, shift, scale = torch.randn(2, 7, 64), torch.randn(2, 64), torch.randn(2, 64)
    alone = modulated_norm(x[1:], shift[1:], scale[1:], EPS)
    assert_matches(modulated_norm(x, shift, scale, EPS)[1:], alone, 0)


def test_rms_norm_spans_all_heads() -> None:
    x = torch.cat((torch.full((1, 1, 128), 3.0), torch.full((1, 1, 128), 4.0)), -1)
    y = rms_norm(x, torch.ones(256), 0.0)
    assert_matches(y[..., 0] / y[..., -1], torch.tensor([[0.75]]), 1e-6)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 20), heads=st.integers(1, 4), seed=st.integers(0, 9999))
def test_rotation_is_multiplication_by_a_unit_number(tokens: int, heads: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, heads, 16, generator=generator)
    angle = torch.randn(tokens, 8, generator=generator) * 10
    turned = torch.view_as_complex(x.double().unflatten(-1, (8, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angle).double(), angle.double())[:, None]
    expected = torch.view_as_real(turned).flatten(-2)
    assert_matches(rotate(x, angle.cos(), angle.sin()).double(), expected, 1e-5)


def test_rotation_takes_strided_input() -> None:
    x = torch.randn(1, 6, 3 * 2 * 16).view(1, 6, 3, 2, 16)[:, :, 1]
    angle = torch.randn(6, 8)
    assert_matches(rotate(x, angle.cos(), angle.sin()), rotate(x.contiguous(), angle.cos(), angle.sin()), 0)


def test_gated_residual_rounds_gate_product_and_sum() -> None:
    x, y = (torch.randn(2, 5, 64).to(torch.bfloat16) for _ in range(2))
    gate = torch.randn(2, 64)
    product = (y.float() * gate.to(torch.bfloat16).float()[:, None]).to(torch.bfloat16)
    assert_matches(gated_residual(x, y, gate), (x.float() + product.float()).to(torch.bfloat16), 0)
