"""The convolution in int8 against independent definitions, and its ONNX body and its kernel against its definition."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.numerics import assert_matches, relative_rms
from tests.onnx_runner import run_body
from tests.plugins.kernels import DEVICE, DTYPES, FLOAT32_ERROR, cases, randn, rounding_error
from wanforge.errors import ShapeError
from wanforge.plugins.channel_norm.reference import channel_norm
from wanforge.plugins.int8_convolution import onnx_function
from wanforge.plugins.int8_convolution.fused import ConvolutionWeight, convolve, taps_last
from wanforge.plugins.int8_convolution.op import channel_steps, int8_convolution
from wanforge.plugins.int8_convolution.reference import quantise_weight, steps_per_unit, sums
from wanforge.plugins.launching.launch import recording

SHAPES = {  # new frames, rows, columns, channels in and out
    "one position": (1, 1, 1, 32, 32),
    "ragged": (3, 5, 7, 24, 40),
    "several blocks": (2, 11, 13, 16, 8),
    "the widths of TinyWan": (2, 3, 5, 8, 16),
    "Wan's 96 channels": (1, 4, 6, 96, 96),
    "Wan's 96 channels to pixels": (1, 4, 6, 96, 3),
    "Wan's 192 channels to 384": (1, 2, 3, 192, 384),
}
FEW = ("one position", "ragged", "the widths of TinyWan")
Shape = tuple[int, int, int, int, int]


def steps(*shape: int, seed: int) -> Tensor:
    """Whole numbers from -127 to 127, the extremes among them."""
    values = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    values.view(-1)[:2] = torch.tensor([-127, 127], dtype=torch.int8)
    return values.to(DEVICE)


def test_sums_are_those_of_whole_numbers() -> None:
    x, weight = steps(2, 384, 5, 4, 3, seed=1), steps(5, 384, 3, 3, 3, seed=2)
    x[:, :, :3], weight[0] = 127, 127
    expected = F.conv3d(x.double(), weight.double(), padding=(0, 1, 1))
    assert expected.max() == 127 * 127 * 384 * 27  # beyond 2^24, where float32 would round
    assert torch.equal(sums(x, weight).double(), expected)


def test_a_step_is_a_share_of_the_gain() -> None:
    x, gain = torch.tensor([[4.0, -8.0, 1.0, 0.5, 1.5]]).T[None], torch.tensor([[1.0], [-1.0], [0.5], [0.0], [127 / 4]])
    assert steps_per_unit(gain).flatten().tolist() == pytest.approx([31.75, 31.75, 63.5, 127e6, 1.0])
    # Halves go to the even number, and what is beyond the reach is clipped.
    assert channel_steps(x, gain).flatten().tolist() == [127, -127, 64, 127, 2]


def test_a_weight_has_a_scale_for_each_output() -> None:
    weight, gain = randn(5, 24, 3, 3, 3, seed=1), 1 + 0.2 * randn(24, seed=2)
    weight[2] = 0
    rounded, scale = quantise_weight(weight, gain)
    assert rounded.abs().amax((1, 2, 3, 4)).tolist() == [127, 127, 0, 127, 127]
    restored = rounded * scale.view(-1, 1, 1, 1, 1) * steps_per_unit(gain).view(-1, 1, 1, 1)
    assert relative_rms(restored, weight) < 0.01
    assert (restored[2] == 0).all()


def test_it_is_nearly_the_convolution_in_float32() -> None:
    x, gain, weight, bias = randn(1, 24, 5, 6, 7, seed=1), 1 + 0.2 * randn(24, seed=2), randn(8, 24, 3, 3, 3, seed=3), 0
    normed = F.silu(channel_norm(x, gain.view(-1, 1, 1, 1)))
    expected = F.conv3d(normed, weight, padding=(0, 1, 1))
    zeros = torch.zeros(8, device=DEVICE) + bias
    found = int8_convolution(channel_steps(normed, gain.view(-1, 1, 1, 1)), *quantise_weight(weight, gain), zeros)
    assert relative_rms(found, expected) < 0.02


def test_what_does_not_fit_is_refused() -> None:
    x, weight, ones = steps(1, 16, 3, 2, 2, seed=1), steps(8, 16, 3, 3, 3, seed=2), torch.ones(8, device=DEVICE)
    for given in ((x[:, :8], weight, ones, ones), (x, weight, ones[:4], ones), (x.float(), weight, ones, ones)):
        with pytest.raises(ShapeError, match="do not fit"):
            int8_convolution(*given)
    last = x[0].movedim(0, -1).contiguous()
    with pytest.raises(ShapeError, match="residual"):
        convolve(last, ConvolutionWeight(taps_last(weight), ones, ones), torch.float32, torch.zeros(1, device=DEVICE))


def test_large_pictures_are_launched_or_refused() -> None:
    """A grid may have 2^31 programs along x, but 65,535 along the other axes."""
    with torch.device("meta"):
        weight = ConvolutionWeight(torch.empty(96, 27 * 96, dtype=torch.int8), torch.empty(96), torch.empty(96))
        picture, larger = (torch.empty(4, rows, 3072, 96, dtype=torch.int8) for rows in (1440, 2160))
    with recording(90) as recorded:
        convolve(picture, weight, torch.bfloat16)
    assert [launch.grid for launch in recorded.launches] == [(1440 * 3072 // 64, 1, 1)]
    with pytest.raises(ShapeError, match="frames of 3072x2160 with 96 channels are too large"):
        convolve(larger, weight, torch.bfloat16)


def test_what_the_kernel_would_read_wrongly_is_refused() -> None:
    x, ones = steps(3, 2, 2, 16, seed=1), torch.ones(8, device=DEVICE)
    weight = ConvolutionWeight(steps(8, 27 * 16, seed=2), ones, ones)
    for wrong in (x.float(), x.movedim(-1, 0).contiguous().movedim(0, -1)):
        with pytest.raises(ShapeError, match=r"int8, not .* contiguous"):
            convolve(wrong, weight, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_onnx_bodies_match(dtype: torch.dtype) -> None:
    x, gain = 2 * randn(1, 24, 4, 5, 3, seed=1).cpu().to(dtype), randn(24, 1, 1, 1, seed=2).cpu()
    expected = channel_steps(x, gain)
    found = run_body(onnx_function.STEPS, onnx_function.functions(), [x, gain], expected.shape, dtype=torch.int8)
    assert torch.equal(found, expected)
    weight, scale, bias = steps(8, 24, 3, 3, 3, seed=3).cpu(), 0.01 + torch.rand(8), torch.randn(8)
    product = int8_convolution(expected, weight, scale, bias)
    given = [expected, weight, scale, bias]
    found = run_body(onnx_function.NAME, onnx_function.functions(), given, product.shape, dtype=torch.float32)
    assert_matches(found, product, FLOAT32_ERROR)


# The kernel.


def channels_last(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW[0].movedim(0, -1).contiguous()


@pytest.mark.slow
@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("around", [0, 1])
@pytest.mark.parametrize("shape", cases(SHAPES, *FEW))
def test_the_kernels_sums_are_the_references_to_the_bit(shape: Shape, around: int) -> None:
    frames, height, width, inputs, outputs = shape
    height += 2 - 2 * around
    x, weight = steps(1, inputs, 2 + frames, height, width, seed=1), steps(outputs, inputs, 3, 3, 3, seed=2)
    expected = sums(x, weight)[:, :, :, 1 - around : height - 1 + around]
    ones, zeros = torch.ones(outputs, device=DEVICE), torch.zeros(outputs, device=DEVICE)
    found = convolve(channels_last(x), ConvolutionWeight(taps_last(weight), ones, zeros), torch.float32, around=around)
    assert torch.equal(found, channels_last(expected.float()))


@pytest.mark.slow
@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_ends_as_the_reference(dtype: torch.dtype, has_residual: bool) -> None:
    frames, height, width, inputs, outputs = SHAPES["ragged"]
    x, weight = steps(1, inputs, 2 + frames, height, width, seed=1), steps(outputs, inputs, 3, 3, 3, seed=2)
    scale, bias = 1e-4 * (1 + randn(outputs, seed=3).abs()), randn(outputs, seed=4)
    residual = randn(1, outputs, frames, height, width, seed=5, dtype=dtype)
    expected = int8_convolution(x, weight, scale, bias).to(dtype)
    given = ConvolutionWeight(taps_last(weight), scale, bias)
    found = convolve(channels_last(x), given, dtype, channels_last(residual) if has_residual else None)
    assert_matches(found, channels_last(expected + residual if has_residual else expected), rounding_error(dtype, 0.1))
