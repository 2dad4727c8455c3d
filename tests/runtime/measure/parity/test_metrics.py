"""The difference metrics: what each of them means, and how they treat NaN and infinity."""

import math

import pytest
import torch

from wanforge.runtime.measure.parity.metrics import clip_difference, difference, ssim


def test_a_known_error_has_known_numbers() -> None:
    expected = torch.tensor([3.0, -4.0, 0.0, 0.0])
    found = difference(expected + torch.tensor([0.0, 0.0, 0.5, 0.0]), expected)
    assert found.rms == pytest.approx(0.5 / 5)
    assert found.max == pytest.approx(0.5 / 2.5)
    assert found.cosine == pytest.approx(5 / math.hypot(5, 0.5))
    assert found.psnr_db == pytest.approx(10 * math.log10(7**2 / (0.25 / 4)))
    assert (found.nan, found.inf, found.ssim) == (0, 0, None)


def test_equal_tensors_are_infinitely_near_and_json_says_null() -> None:
    for x in (torch.randn(7), torch.zeros(7)):
        found = difference(x, x.clone())
        assert (found.rms, found.max) == (0, 0)
        assert found.cosine == pytest.approx(1)
        assert found.psnr_db == math.inf
        assert found.as_json()["psnr_db"] is None


def test_numbers_that_are_none_are_counted_and_left_out() -> None:
    expected = torch.arange(1.0, 7.0)
    actual = expected.clone()
    actual[0], actual[1], actual[2] = math.nan, math.inf, -math.inf
    found = difference(actual, expected)
    assert (found.nan, found.inf, found.rms) == (1, 2, 0)
    assert difference(torch.full((3,), math.nan), torch.ones(3)).rms == math.inf


def test_what_the_reference_has_not_is_not_held_against_anyone() -> None:
    x = torch.tensor([1.0, math.inf])
    assert (difference(x, x).nan, difference(x, x).inf, difference(x, x).rms) == (0, 0, 0)


def test_similarity_sees_structure_where_the_mean_square_sees_none() -> None:
    torch.manual_seed(0)
    frames = (torch.rand(2, 32, 48, 3) * 200).to(torch.uint8)
    assert ssim(frames, frames) == pytest.approx(1)
    # The same mean square error, once as a shift of brightness and once as noise.
    brighter = frames + 20
    noisy = (frames.int() + 20 * (2 * torch.randint(0, 2, frames.shape) - 1)).clamp(0, 255).to(torch.uint8)
    assert ssim(brighter, frames) > ssim(noisy, frames)
    assert clip_difference(brighter, frames).psnr_db == pytest.approx(10 * math.log10(255**2 / 400))


def test_similarity_of_two_flat_pictures_is_known() -> None:
    """Without structure only the luminance term is left: (2ab + c) / (a^2 + b^2 + c)."""
    a, b = torch.full((1, 16, 16, 3), 51, dtype=torch.uint8), torch.full((1, 16, 16, 3), 102, dtype=torch.uint8)
    assert ssim(a, b) == pytest.approx((2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4), rel=1e-4)
