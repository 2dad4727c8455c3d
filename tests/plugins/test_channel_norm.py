"""The channel norm and what is fused to it, against independent definitions, and the kernel against its definition."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.numerics import assert_matches
from tests.plugins.kernels import DEVICE, DTYPES, FLOAT32_ERROR, HALF_SPACING, cases, randn
from wanforge.errors import ShapeError
from wanforge.plugins.channel_norm import PAST
from wanforge.plugins.channel_norm.fused import History, Stream, forget, joined, normed, summed
from wanforge.plugins.channel_norm.reference import channel_norm, double, folded_weight, unfolded
from wanforge.plugins.int8_convolution.reference import channel_steps, steps_per_unit

SHAPES = {  # frames, rows, columns, channels
    "one position": (1, 1, 1, 16),
    "ragged": (3, 5, 7, 24),
    "Wan's 96 channels": (4, 6, 10, 96),
    "Wan's 384 channels": (2, 3, 5, 384),
    "whole blocks": (1, 16, 16, 128),
}
FEW = ("one position", "ragged")
Shape = tuple[int, int, int, int]


def test_the_norm_is_by_the_root_mean_square() -> None:
    x, weight = randn(2, 24, 3, 5, 7, seed=1), randn(24, seed=2)
    exact = x.double()
    expected = exact / exact.square().mean(1, keepdim=True).sqrt() * weight.double()[:, None, None, None]
    assert_matches(channel_norm(x, weight[:, None, None, None]).double(), expected, FLOAT32_ERROR)


def test_channels_of_zeros_stay_zeros() -> None:
    x = torch.zeros(1, 24, 2, device=DEVICE)
    assert not channel_norm(x, torch.ones(24, 1, device=DEVICE)).any()


def test_a_folded_convolution_is_that_of_doubled_pixels() -> None:
    x, weight, bias = randn(3, 8, 5, 7, seed=1), randn(6, 8, 3, 3, seed=2), randn(6, seed=3)
    expected = F.conv2d(double(x), weight, bias, padding=1)
    folded = folded_weight(weight)
    assert folded.shape == (24, 8, 2, 2)
    assert_matches(unfolded(F.conv2d(x, folded, bias.repeat(4), padding=1)), expected, FLOAT32_ERROR)


# The kernel.


def channels_first(x_THWC: Tensor) -> Tensor:
    return x_THWC.movedim(-1, 0)[None]


def channels_last(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW[0].movedim(0, -1).contiguous()


def stream_of(shape: Shape, dtype: torch.dtype, kind: str) -> tuple[Stream, Tensor]:
    """A stream, and the sum of its parts. Positions differ in magnitude, and one is zero."""
    frames, height, width, channels = shape
    size = torch.logspace(-2, 2, width, device=DEVICE)[:, None]
    branch = randn(*shape, seed=2, dtype=dtype) if "branch" in kind else None
    if "folded" in kind:
        x = randn(frames, height // 2 + 1, width // 2 + 1, 4, channels, seed=1, dtype=dtype)
        whole = unfolded(x.flatten(3).movedim(-1, 1)).movedim(1, -1)
    else:
        x = whole = (randn(*shape, seed=1) * size).to(dtype)
        x[:, 0, 0] = 0
    return Stream(x, branch), whole if branch is None else whole + branch


def history_of(shape: Shape, dtype: torch.dtype, *, is_first: bool) -> History:
    past = None if is_first else randn(PAST, *shape[1:], seed=3, dtype=dtype)
    return History(past, torch.empty((PAST, *shape[1:]), dtype=dtype, device=DEVICE))


def with_past(x_THWC: Tensor, history: History) -> Tensor:
    past = torch.zeros_like(history.kept_PHWC) if history.past_PHWC is None else history.past_PHWC
    return torch.cat((past, x_THWC))


def bound(dtype: torch.dtype) -> float:
    """The norm and SiLU round once each, and a norm that rounds to the other side moves what follows."""
    return FLOAT32_ERROR if dtype == torch.float32 else HALF_SPACING[dtype] / 4


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "next"])
@pytest.mark.parametrize("kind", ["plain", "branch", "folded", "folded, branch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases(SHAPES, *FEW))
def test_the_input_of_a_convolution_is_the_reference(
    shape: Shape, dtype: torch.dtype, kind: str, is_first: bool
) -> None:
    if "folded" in kind:
        shape = (shape[0], 2 * shape[1], 2 * shape[2], shape[3])
    stream, whole = stream_of(shape, dtype, kind)
    weight, history = 1 + 0.2 * randn(shape[3], seed=4), history_of(shape, dtype, is_first=is_first)
    activated = F.silu(channel_norm(channels_first(whole), weight[:, None, None, None]))
    expected = with_past(channels_last(activated), history)
    actual, after = normed(stream, weight, history)
    assert_matches(actual, expected, bound(dtype))
    assert torch.equal(history.kept_PHWC, actual[-PAST:])
    assert after.branch_THWC is None
    assert torch.equal(summed(after), whole)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "next"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_input_of_a_convolution_in_int8_is_the_reference(dtype: torch.dtype, is_first: bool) -> None:
    shape = SHAPES["ragged"]
    stream, whole = stream_of(shape, dtype, "branch")
    weight, blank = 1 + 0.2 * randn(shape[3], seed=4), torch.empty((PAST, *shape[1:]), dtype=torch.int8, device=DEVICE)
    past = None if is_first else torch.full_like(blank, -5)
    gain = weight[:, None, None, None]
    expected = with_past(
        channels_last(channel_steps(F.silu(channel_norm(channels_first(whole), gain)), gain)), History(past, blank)
    )
    actual, after = normed(stream, weight, History(past, blank), steps_C=steps_per_unit(weight))
    apart = (actual.int() - expected.int()).abs()
    # The kernel's norm and SiLU round now and then to the other side, which may be beyond half a step.
    assert apart.max() <= 1
    assert apart.float().mean() < 2e-3
    assert torch.equal(blank, actual[-PAST:])
    assert torch.equal(summed(after), whole)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("kind", ["plain", "branch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_input_of_attention_is_the_reference(dtype: torch.dtype, kind: str) -> None:
    stream, whole = stream_of(SHAPES["ragged"], dtype, kind)
    weight = randn(24, seed=4)
    expected = channels_last(channel_norm(channels_first(whole), weight[:, None, None, None]))
    actual, _ = normed(stream, weight, activates=False, keeps_sum=False)
    assert_matches(actual, expected, bound(dtype))


def test_norms_count_as_no_less_than_their_least() -> None:
    """Norms of 1, 1e-6, 1e-11, half of the least norm, and 1e-15."""
    size = torch.tensor([1, 1e-6, 1e-11, 5e-13, 1e-15], device=DEVICE)[:, None]
    x = F.normalize(randn(1, 1, 5, 24, seed=1), dim=3) * size
    weight = torch.ones(24, device=DEVICE)
    expected = channels_last(channel_norm(channels_first(x), weight[:, None, None, None]))
    actual, _ = normed(Stream(x), weight, activates=False)
    for column in range(5):
        assert_matches(actual[:, :, column], expected[:, :, column], FLOAT32_ERROR)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "next"])
@pytest.mark.parametrize("kind", ["plain", "branch", "folded, branch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_and_past_frames_are_the_reference_to_the_bit(dtype: torch.dtype, kind: str, is_first: bool) -> None:
    shape = (3, 6, 10, 24)
    stream, whole = stream_of(shape, dtype, kind)
    history = history_of(shape, dtype, is_first=is_first)
    assert torch.equal(summed(stream), whole)
    actual = joined(stream, history)
    assert torch.equal(actual, with_past(whole, history))
    assert torch.equal(history.kept_PHWC, actual[-PAST:])


@pytest.mark.usefixtures("guarded")
def test_what_is_forgotten_is_zeros() -> None:
    history = history_of((1, 5, 7, 24), DTYPES[0], is_first=True)
    forget(history)
    assert not history.kept_PHWC.any()


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.zeros(2, 4, 6, 24, device=DEVICE), torch.zeros(24, device=DEVICE)
    with pytest.raises(ShapeError, match="channels last"):
        summed(Stream(torch.zeros(2, 24, 4, 6, device=DEVICE).movedim(1, -1), x))
    with pytest.raises(ShapeError, match=r"branch .* does not fit"):
        summed(Stream(x, x[:1]))
    with pytest.raises(ShapeError, match=r"weight .* does not fit"):
        normed(Stream(x), weight[:8])
    with pytest.raises(ShapeError, match=r"past .* does not fit"):
        joined(Stream(x), History(x[:1], x.clone()))
    with pytest.raises(ShapeError, match=r"kept .* does not fit"):
        joined(Stream(x), History(x, torch.zeros(2, 24, 4, 6, device=DEVICE).movedim(1, -1)))
