"""The W8A8 linear equals integer arithmetic and upstream's recorded values bit for bit."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import golden
from tests.numerics import assert_matches, relative_rms
from tests.onnx_runner import run_body
from wanforge.errors import ShapeError
from wanforge.plugins.quantiser.reference import TILE, quantise_rows, quantise_tiles
from wanforge.plugins.w8a8_linear import onnx_function
from wanforge.plugins.w8a8_linear.op import w8a8_linear

SHAPES = {  # rows, inputs, outputs
    "one row": (1, 128, 8),
    "one tile": (128, 128, 128),
    "ragged rows": (130, 256, 128),
    "ragged rows and outputs": (333, 384, 200),
    "Wan 1.3B's narrow side": (77, 1536, 72),
}
BY_ROW = {"w8a8-row": torch.int8, "fp8-row": torch.float8_e4m3fn}
# The body adds up K products in one float32 sum, the reference slab by slab; both err by a few spacings of float32.
BODY_TOLERANCE = 1e-6


def operands(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, tile: int = TILE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + inputs + outputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    steps, scale = quantise_tiles(torch.randn(outputs, inputs, generator=generator), tile)
    return x, steps, scale, torch.randn(outputs, generator=generator).to(torch.bfloat16)


def integer_linear(x: Tensor, w_steps: Tensor, w_scale: Tensor, bias: Tensor, size: int = TILE) -> np.ndarray:
    """The definition spelled out in numpy with int32 sums, sharing nothing with the reference but rounding to even."""
    rows, inputs = x.shape
    values = x.float().numpy()
    total = np.zeros((rows, len(w_steps)), np.float32)
    for i in range(0, rows, size):
        for k in range(0, inputs, size):
            tile = values[i : i + size, k : k + size]
            amax = np.float32(max(np.float32(1e-8), np.abs(tile).max()))
            steps = np.clip(np.rint(tile * (np.float32(128) / amax)), -128, 127).astype(np.int32)
            for j in range(0, len(w_steps), size):
                sums = steps @ w_steps[j : j + size, k : k + size].numpy().astype(np.int32).T
                factor = np.float32(amax / np.float32(128)) * w_scale[j // size, k // size].numpy()
                total[i : i + size, j : j + size] += sums.astype(np.float32) * factor
    return total.astype(np.float32) + bias.float().numpy()


def dequantise_tiles(int8_RC: Tensor, scale: Tensor) -> Tensor:
    """Restore float32 values from `quantise_tiles`; each is off by at most one scale (half of one below +127)."""
    rows, columns = int8_RC.shape
    per_element = scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    return int8_RC.float() * per_element


@pytest.mark.parametrize("tile", [64, 256])
def test_other_tiles_are_the_same_arithmetic(tile: int) -> None:
    x, steps, scale, bias = operands(333, 512, 200, torch.float32, tile)
    assert scale.shape == (-(-200 // tile), 512 // tile)
    found = w8a8_linear(x, steps, scale, bias)
    assert_matches(found, torch.from_numpy(integer_linear(x, steps, scale, bias, tile)), 0)


def test_finer_tiles_are_nearer() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(512, 512) * torch.rand(512, 1), torch.randn(256, 512) * torch.rand(512)
    errors = [
        relative_rms(w8a8_linear(x, *quantise_tiles(w, tile), torch.zeros(256)), x @ w.T) for tile in (64, 128, 256)
    ]
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", ["int8_linear_ragged_m", "int8_linear_ragged_mn"])
def test_equals_the_recorded_values_to_the_bit(name: str) -> None:
    case = golden.load(name)
    for source, key in (("input:x", "output:x_"), ("weight:X.weight", "weight:X.")):
        steps, scale = quantise_tiles(case[source])
        weight = "int8_weight" if key.startswith("weight") else "int8"
        assert_matches(steps, case[f"{key}{weight}"], 0, name=f"{source} steps")
        assert_matches(scale, case[f"{key}scale"], 0, name=f"{source} scale")
    y = w8a8_linear(case["input:x"], case["weight:X.int8_weight"], case["weight:X.scale"], case["weight:X.bias"])
    assert_matches(y, case["output:y_bf16_plus_bias"], 0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_integer_arithmetic_to_the_bit(shape: tuple[int, int, int]) -> None:
    x, steps, scale, bias = operands(*shape, torch.float32)
    expected = integer_linear(x, steps, scale, bias)
    assert_matches(w8a8_linear(x, steps, scale, bias), torch.from_numpy(expected), 0)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 300), slabs=st.integers(1, 4), outputs=st.integers(1, 200))
def test_equals_integer_arithmetic_for_any_shape(rows: int, slabs: int, outputs: int) -> None:
    x, steps, scale, bias = operands(rows, slabs * TILE, outputs, torch.float32)
    assert_matches(w8a8_linear(x, steps, scale, bias), torch.from_numpy(integer_linear(x, steps, scale, bias)), 0)


def test_largest_values_map_to_minus_128_and_127() -> None:
    x = torch.zeros(128, 256)
    x[3, 5], x[4, 6], x[5, 7] = -2.0, 2.0, 1.0
    x[0, 130] = 1e-12  # a tile whose largest value is below 1e-8 becomes zeros
    steps, scale = quantise_tiles(x)
    assert [int(steps[3, 5]), int(steps[4, 6]), int(steps[5, 7])] == [-128, 127, 64]
    assert scale.tolist() == [[2.0 / 128, np.float32(1e-8) / np.float32(128)]]
    assert int(steps[:, 128:].abs().sum()) == 0


def test_halves_round_to_even() -> None:
    x = torch.zeros(1, 128)
    x[0, :5] = torch.tensor([128.0, 0.5, 1.5, 2.5, -0.5])
    assert quantise_tiles(x)[0][0, :5].tolist() == [127, 0, 2, 2, 0]


def test_all_zero_input_gives_the_bias() -> None:
    _, steps, scale, bias = operands(5, 256, 40, torch.float32)
    y = w8a8_linear(torch.zeros(5, 256), steps, scale, bias)
    assert_matches(y, bias.float().expand(5, 40), 0)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 260),
    columns=st.integers(1, 260),
    magnitude=st.sampled_from([1e-20, 1e-6, 1.0, 1e6, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_restored_values_are_off_by_at_most_one_step(rows: int, columns: int, magnitude: float, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * magnitude
    steps, scale = quantise_tiles(x)
    assert steps.shape == x.shape
    assert scale.shape == (-(-rows // TILE), -(-columns // TILE))
    allowed = scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns] * 1.0001
    assert ((dequantise_tiles(steps, scale) - x).abs() <= allowed).all()


def test_rounds_to_the_activation_type_before_and_after_the_bias() -> None:
    x, steps, scale, bias = operands(64, 256, 96, torch.bfloat16)
    without_bias = w8a8_linear(x, steps, scale, torch.zeros_like(bias))
    assert_matches(w8a8_linear(x, steps, scale, bias), without_bias + bias, 0)
    exact = integer_linear(x, steps, scale, torch.zeros_like(bias))
    assert_matches(without_bias, torch.from_numpy(exact).to(torch.bfloat16), 0)


def test_takes_strided_and_batched_input() -> None:
    x, steps, scale, bias = operands(260, 256, 64, torch.float32)
    expected = w8a8_linear(x, steps, scale, bias)
    strided = torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    assert_matches(w8a8_linear(strided, steps, scale, bias), expected, 0, name="strided")
    # Tiles run across the leading dimensions, so samples of 130 rows share the middle tile.
    assert_matches(w8a8_linear(x.view(2, 130, 256), steps, scale, bias), expected.view(2, 130, 64), 0, name="batched")
    alone = w8a8_linear(x[130:], steps, scale, bias)
    assert relative_rms(alone, expected[130:]) > 1e-5


@pytest.mark.parametrize(
    ("inputs", "scale_shape", "bias", "message"),
    [
        (100, (1, 1), 40, "K is 100"),
        (256, (1, 3), 40, "do not fit"),
        (256, (1, 2), 41, "do not fit"),
    ],
)
def test_refuses_tensors_that_do_not_fit(inputs: int, scale_shape: tuple[int, int], bias: int, message: str) -> None:
    weight = torch.zeros(40, inputs, dtype=torch.int8)
    with pytest.raises(ShapeError, match=message):
        w8a8_linear(torch.zeros(3, inputs), weight, torch.ones(scale_shape), torch.zeros(bias))


def test_refuses_8_bit_floats_with_scales_by_tile() -> None:
    weight = torch.zeros(128, 128, dtype=torch.float8_e4m3fn)
    with pytest.raises(ShapeError, match="do not fit"):
        w8a8_linear(torch.zeros(3, 128), weight, torch.ones(1, 1), torch.zeros(128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_onnx_body_matches(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, steps, scale, bias = operands(*shape, dtype)
    expected = w8a8_linear(x[None], steps, scale, bias)
    actual = run_body(onnx_function.NAME, onnx_function.functions(), [x[None], steps, scale, bias], expected.shape)
    # ONNX Runtime has no float16 sum on a CPU, and omits the rounding between product and bias: half a spacing.
    assert_matches(actual, expected, BODY_TOLERANCE if dtype == torch.float32 else 5e-4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    outputs=st.integers(1, 9),
    slabs=st.integers(1, 3),
    magnitude=st.sampled_from([1e-12, 1e-3, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_scales_by_row_are_integer_arithmetic(
    rows: int, outputs: int, slabs: int, magnitude: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows + 10 * outputs)
    x = (magnitude * torch.randn(rows, 128 * slabs, generator=generator)).to(dtype)
    w_steps, w_scale = quantise_rows(torch.randn(outputs, 128 * slabs, generator=generator))
    bias = torch.randn(outputs, generator=generator).to(torch.bfloat16)
    x32 = x.float().numpy()
    amax = np.maximum(np.abs(x32).max(1), np.float32(1e-8))
    steps = np.rint(x32 * (np.float32(127) / amax)[:, None]).astype(np.int64)
    assert np.abs(steps).max() <= 127
    sums = (steps @ w_steps.numpy().astype(np.int64).T).astype(np.float32)
    scaled = torch.from_numpy(sums * ((amax / np.float32(127))[:, None] * w_scale.numpy()))
    expected = scaled.to(dtype) + bias.to(dtype)
    assert_matches(w8a8_linear(x, w_steps, w_scale, bias), expected, 0)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    outputs=st.integers(1, 9),
    slabs=st.integers(1, 3),
    magnitude=st.sampled_from([1e-12, 1e-3, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_8_bit_floats_by_row_are_numpys(
    rows: int, outputs: int, slabs: int, magnitude: float, dtype: torch.dtype
) -> None:
    """The steps are ml_dtypes' own, and sums of their products are exact in integers of 2^-18."""
    generator = torch.Generator().manual_seed(rows + 10 * outputs)
    x = (magnitude * torch.randn(rows, 128 * slabs, generator=generator)).to(dtype)
    w_steps, w_scale = quantise_rows(torch.randn(outputs, 128 * slabs, generator=generator), torch.float8_e4m3fn)
    bias = torch.randn(outputs, generator=generator).to(torch.bfloat16)
    x32 = x.float().numpy()
    amax = np.maximum(np.abs(x32).max(1), np.float32(1e-8))
    steps = (x32 * (np.float32(448) / amax)[:, None]).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert np.abs(steps).max() <= 448
    whole, w_whole = ((512 * each).astype(np.int64) for each in (steps, w_steps.double().numpy()))
    sums = (np.ldexp((whole @ w_whole.T).astype(np.float64), -18)).astype(np.float32)
    scaled = torch.from_numpy(sums * ((amax / np.float32(448))[:, None] * w_scale.numpy()))
    expected = scaled.to(dtype) + bias.to(dtype)
    assert_matches(w8a8_linear(x, w_steps, w_scale, bias), expected, 0)


def test_a_row_of_8_bit_floats_by_hand() -> None:
    """Three bits follow the leading one, so from 16 to 32 numbers are 2 apart; below 2^-6 they are 2^-9 apart."""
    x = torch.tensor([[448.0, -448.0, 17.0, 19.0, -21.0, 2.0**-10, 3 * 2.0**-10, 0.0]]) * 2
    steps, scale = quantise_rows(x, torch.float8_e4m3fn)
    assert scale.tolist() == [2.0]
    assert steps.float().tolist() == [[448.0, -448.0, 16.0, 20.0, -20.0, 0.0, 2.0**-8, 0.0]]


@pytest.mark.parametrize(("linear", "steps_of"), BY_ROW.items(), ids=BY_ROW)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_body_by_row_is_the_reference(shape: tuple[int, int, int], linear: str, steps_of: torch.dtype) -> None:
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, inputs, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    x[0, 0, 7:] *= 1e-5  # below the smallest normal number of e4m3
    steps, scale = quantise_rows(torch.randn(outputs, inputs, generator=generator), steps_of)
    bias = torch.randn(outputs, generator=generator)
    expected = w8a8_linear(x, steps, scale, bias)
    body = onnx_function.functions(linear)
    actual = run_body(onnx_function.NAME, body, [x, steps, scale, bias], expected.shape)
    assert_matches(actual, expected, BODY_TOLERANCE)


def test_the_bodys_steps_are_the_references_to_the_bit() -> None:
    """A weight of ones on the diagonal shows them. Every value of bfloat16 from 2^-11 to 2^8 is rounded."""
    one, binade = 0x3F800000, 1 << 23
    values = torch.arange(one - 11 * binade, one + 8 * binade, 1 << 16, dtype=torch.int32).view(torch.float32)
    x = torch.cat([values.view(-1, 128), -values.view(-1, 128)])
    x[:, 0] = 448
    weight, ones = torch.eye(128).to(torch.float8_e4m3fn), torch.ones(128)
    expected, scale = quantise_rows(x, torch.float8_e4m3fn)
    assert (scale == 1).all()
    body = onnx_function.functions("fp8-row")
    actual = run_body(onnx_function.NAME, body, [x, weight, ones, torch.zeros(128)], x.shape)
    assert torch.equal(actual, expected.float())


def test_finer_scales_are_more_accurate_where_channels_or_tokens_differ() -> None:
    """Where tokens differ greatly in magnitude, the largest one of a tile sets the step of all."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(256, 512, generator=generator) * torch.logspace(-1, 1, 256)[torch.randperm(256)][:, None]
    weight = torch.randn(256, 512, generator=generator)
    bias = torch.zeros(256)
    exact = x.double() @ weight.double().T

    def error(quantise: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        y = w8a8_linear(x, *quantise(weight), bias).double()
        return ((y - exact).norm(dim=1) / exact.norm(dim=1)).median()

    assert error(quantise_rows) < 0.25 * error(quantise_tiles)
