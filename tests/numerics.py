"""How all tests compare tensors."""

import torch
from torch import Tensor


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference divided by the RMS of the expected tensor, in float64."""
    a, e = actual.double(), expected.double()
    return float((a - e).square().mean().sqrt() / e.square().mean().sqrt().clamp_min(1e-30))


def psnr(actual: Tensor, expected: Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio in dB; infinite where nothing differs."""
    error = (actual.double() - expected.double()).square().mean()
    return float("inf") if error == 0 else float(10 * torch.log10(peak**2 / error))


def assert_matches(actual: Tensor, expected: Tensor, rms: float, *, name: str = "tensor") -> None:
    """Assert equal shape and dtype, finite values and a relative RMS error of at most `rms` (0: exactly equal)."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert torch.isfinite(actual.double()).all(), f"{name}: not finite"
    if rms == 0:
        differing = int((actual != expected).sum())
        assert differing == 0, f"{name}: {differing} of {actual.numel()} elements differ"
        return
    error = relative_rms(actual, expected)
    assert error <= rms, f"{name}: relative RMS error {error:.3e} exceeds {rms:.0e}"
