"""The NVFP4 linear equals its definition spelled out in numpy, and its ONNX body equals the reference bit for bit."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.numerics import assert_matches, relative_rms
from tests.onnx_runner import run_body
from wanforge.errors import ShapeError
from wanforge.plugins.nvfp4_linear import INPUT_SCALE, onnx_function
from wanforge.plugins.nvfp4_linear.op import nvfp4_linear
from wanforge.plugins.nvfp4_linear.reference import (
    dequantise,
    global_scale_of,
    pack,
    quantise_blocks,
    quantise_weight,
    rounded,
    unpack,
)

SHAPES = {  # rows, inputs, outputs
    "one block": (1, 16, 3),
    "ragged everywhere": (37, 48, 29),
    "Wan 1.3B's narrow side": (33, 1536, 40),
}
ONE = torch.ones(())


def quantised(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = global_scale_of(weight.abs().amax())
    return *quantise_weight(weight, scale), scale


def operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + inputs + outputs)
    x = torch.randn(rows, inputs, generator=generator) * (0.1 + torch.rand(rows, 1, generator=generator))
    weight = torch.randn(outputs, inputs, generator=generator) * 0.05
    return x, quantised(weight.to(torch.bfloat16)), torch.randn(outputs, generator=generator).to(torch.bfloat16)


def restored(x: np.ndarray, global_scale: np.float32) -> np.ndarray:
    """Values after quantising, by numpy's own conversions to 4-bit and 8-bit floats."""
    blocks = x.astype(np.float32).reshape(len(x), -1, 16)
    amax = np.abs(blocks).max(2, keepdims=True)
    scale = (amax / (np.float32(6) * global_scale)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * global_scale
    numbers = (blocks / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (numbers * scale).reshape(x.shape)


def test_a_block_by_hand() -> None:
    """Of a tensor whose largest magnitude is 1,344 the global scale is a half; of a block whose largest is 12 the scale
    is four."""
    scale = global_scale_of(torch.tensor(1344.0))
    block = [12.0, 10.0, 5.0, 1.0, -0.5, 0.25, -12.0, 7.0, 3.0, -9.0, 0.0, 6.5, 2.0, 4.0, 8.0, 11.0]
    values, scales = quantise_blocks(torch.tensor([block]), scale)
    assert (float(scale), float(scales)) == (0.5, 4.0)
    # Of the quotients by two, 5, 2.5, 3.5 and 0.25 lie between two numbers and go to the one whose last bit is zero.
    expected = [6.0, 4.0, 2.0, 0.5, -0.0, 0.0, -6.0, 4.0, 1.5, -4.0, 0.0, 3.0, 1.0, 2.0, 4.0, 6.0]
    assert values.tolist() == [expected]
    assert pack(values)[0, :4].tolist() == [0x67, 0x14, 0x08, 0x6F]
    assert unpack(pack(values)).tolist() == [expected]


def test_rounding_is_that_of_4_bit_floats() -> None:
    x = torch.cat([torch.linspace(-7, 7, 2801), torch.tensor([math.inf, -math.inf])])
    expected = x.numpy().clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert_matches(rounded(x), torch.from_numpy(expected), 0)


def test_every_byte_is_packed_as_it_is_unpacked() -> None:
    every = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(pack(unpack(every)), every)
    low = every.numpy() & 15
    assert np.array_equal(unpack(every)[:, ::2].numpy(), low.view(ml_dtypes.float4_e2m1fn).astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_definition(shape: tuple[int, int, int]) -> None:
    x, (packed, scales, scale), bias = operands(*shape)
    weight = dequantise(packed, scales, scale)
    expected = restored(x.numpy(), np.float32(INPUT_SCALE)) @ weight.numpy().T + bias.float().numpy()
    assert_matches(nvfp4_linear(x, packed, scales, scale, bias), torch.from_numpy(expected), 1e-6)


def test_a_weight_is_quantised_by_the_definition() -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    packed, scales, scale = quantised(weight)
    assert float(scale) == pytest.approx(float(weight.abs().max()) / 2688)
    assert float(scales.float().max()) == 448
    expected = torch.from_numpy(restored(weight.numpy(), scale.numpy()))
    assert_matches(dequantise(packed, scales, scale), expected, 1e-7)


def test_zeros_give_the_bias() -> None:
    x, weight, bias = operands(5, 48, 7)
    assert_matches(nvfp4_linear(torch.zeros_like(x), *weight, bias), bias.float().expand(5, 7), 0)
    packed, scales, scale = quantised(torch.zeros(7, 48))
    assert float(scale) == 1
    assert_matches(nvfp4_linear(x, packed, scales, scale, bias), bias.float().expand(5, 7), 0)


def test_a_block_that_is_too_small_for_a_scale_becomes_zeros() -> None:
    values, scales = quantise_blocks(torch.tensor([[1e-3] * 16 + [3.0] * 16]), ONE)
    assert scales.float().tolist() == [[1.0, 0.5]]
    assert values.tolist() == [[0.0] * 16 + [6.0] * 16]


def test_magnitudes_beyond_the_largest_scale_saturate() -> None:
    values, scales = quantise_blocks(torch.tensor([[1e6, -1e6, 1000.0, math.inf] + [0.0] * 12]), ONE)
    assert scales.float().tolist() == [[448.0]]
    assert values[0, :4].tolist() == [6.0, -6.0, 2.0, 6.0]


def test_what_is_not_a_number_stays_in_its_row() -> None:
    x, weight, bias = operands(6, 48, 7)
    expected = nvfp4_linear(x, *weight, bias)
    x[2, 20] = math.nan
    found = nvfp4_linear(x, *weight, bias)
    assert found[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert_matches(found[others], expected[others], 1e-6)


def test_takes_strided_and_batched_input() -> None:
    x, weight, bias = operands(12, 64, 9)
    expected = nvfp4_linear(x, *weight, bias)
    strided = torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    assert_matches(nvfp4_linear(strided, *weight, bias), expected, 0)
    assert_matches(nvfp4_linear(x.view(3, 4, 64), *weight, bias), expected.view(3, 4, 9), 0)


def test_rounds_to_the_type_of_its_input_before_and_after_the_bias() -> None:
    x, weight, bias = operands(9, 64, 9)
    half = x.to(torch.bfloat16)
    product = nvfp4_linear(half.float(), *weight, torch.zeros(9))
    assert_matches(nvfp4_linear(half, *weight, bias), product.to(torch.bfloat16) + bias, 0)


def test_is_about_as_far_from_the_exact_product_as_4_bits_are() -> None:
    """A 4-bit float has two significant bits, so an operand is off by a tenth of its RMS, and the product by more."""
    generator = torch.Generator().manual_seed(11)
    x, weight = torch.randn(64, 512, generator=generator), torch.randn(64, 512, generator=generator)
    error = relative_rms(nvfp4_linear(x, *quantised(weight), torch.zeros(64)), x @ weight.T)
    assert 0.1 < error < 0.16


@pytest.mark.parametrize(
    ("inputs", "scales", "bias", "message"),
    [(40, (8, 2), 8, "K is 40"), (64, (8, 3), 8, "do not fit"), (64, (8, 4), 9, "do not fit")],
)
def test_refuses_tensors_that_do_not_fit(inputs: int, scales: tuple[int, int], bias: int, message: str) -> None:
    packed = torch.zeros(8, inputs // 2, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=message):
        nvfp4_linear(torch.zeros(3, inputs), packed, torch.ones(scales), ONE, torch.zeros(bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_onnx_body_matches(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias = operands(*shape)
    x = x.to(dtype)[None]
    x[0, 0, :16] = torch.tensor([1e6 if dtype == torch.float32 else 6e4, *[1e-5] * 15])  # the scale saturates
    expected = nvfp4_linear(x, *weight, bias)
    actual = run_body(onnx_function.NAME, onnx_function.functions(), [x, *weight, bias], expected.shape)
    # ONNX Runtime has no float16 sum on a CPU, and omits the rounding between product and bias: half a spacing.
    assert_matches(actual, expected, 1e-6 if dtype == torch.float32 else 5e-4)
