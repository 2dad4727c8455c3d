"""How far apart two tensors or two clips are."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

TINY = 1e-30
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the expected one.

    Attributes:
        rms: RMS of the difference divided by the RMS of the expected tensor.
        max: Largest magnitude of the difference, divided by the same RMS.
        cosine: Cosine of the angle between the two.
        psnr_db: Peak signal-to-noise ratio; the peak is the range of the expected tensor, 255 for frames. Infinite
            where nothing differs.
        nan, inf: How many values are NaN or infinite where finite ones were expected; the other metrics leave them out.
        ssim: Structural similarity of frames; None for other tensors.
    """

    rms: float
    max: float
    cosine: float
    psnr_db: float
    nan: int = 0
    inf: int = 0
    ssim: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values; JSON has no infinity, so the PSNR of equal tensors is null."""
        return {**asdict(self), "psnr_db": None if math.isinf(self.psnr_db) else self.psnr_db}


def difference(actual: Tensor, expected: Tensor, *, peak: float | None = None) -> Difference:
    """Compare two tensors of the same shape in float64."""
    a, e = (x.detach().cpu().double().flatten() for x in (actual, expected))
    expects = e.isfinite()
    nan, inf = int((a.isnan() & expects).sum()), int((a.isinf() & expects).sum())
    if nan or inf or not bool(expects.all()):
        both = expects & a.isfinite()
        a, e = a[both], e[both]
    if not len(e):
        return Difference(math.inf, math.inf, 0.0, -math.inf, nan, inf)
    scale = float(e.square().mean().sqrt().clamp_min(TINY))
    d = a - e
    error = float(d.square().mean())
    norms = float(a.norm() * e.norm())
    return Difference(
        rms=math.sqrt(error) / scale,
        max=float(d.abs().max()) / scale,
        cosine=float(a @ e) / norms if norms else float(error == 0),
        psnr_db=psnr(error, float(e.max() - e.min()) if peak is None else peak),
        nan=nan,
        inf=inf,
    )


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference divided by the RMS of the expected tensor."""
    return difference(actual, expected).rms


def psnr(mean_square: float, peak: float) -> float:
    """Peak signal-to-noise ratio in dB."""
    return math.inf if mean_square == 0 else 10 * math.log10(max(peak, TINY) ** 2 / mean_square)


def clip_difference(actual_THWC: Tensor, expected_THWC: Tensor) -> Difference:
    """Compare two clips of uint8 frames ``[T, H, W, 3]``."""
    found = difference(actual_THWC, expected_THWC, peak=255.0)
    return Difference(**{**asdict(found), "ssim": ssim(actual_THWC, expected_THWC)})


def ssim(actual_THWC: Tensor, expected_THWC: Tensor) -> float:
    """Structural similarity of uint8 frames, the mean over frames, channels and the windows that lie inside.

    Source: Wang et al. 2004, "Image quality assessment", with its 11x11 Gaussian window of 1.5 pixels.
    """
    offset = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    weight = (weight / weight.sum()).float()
    scores = [_ssim_frame(a, e, weight) for a, e in zip(actual_THWC, expected_THWC, strict=True)]
    return sum(scores) / len(scores)


def _ssim_frame(actual_HWC: Tensor, expected_HWC: Tensor, weight: Tensor) -> float:
    a, e = (x.permute(2, 0, 1)[:, None].float() / 255 for x in (actual_HWC, expected_HWC))

    def blur(x: Tensor) -> Tensor:
        return conv2d(conv2d(x, weight[None, None, :, None]), weight[None, None, None, :])

    mean_a, mean_e = blur(a), blur(e)
    var_a, var_e, cov = blur(a * a) - mean_a**2, blur(e * e) - mean_e**2, blur(a * e) - mean_a * mean_e
    luminance = (2 * mean_a * mean_e + SSIM_C1) / (mean_a**2 + mean_e**2 + SSIM_C1)
    structure = (2 * cov + SSIM_C2) / (var_a + var_e + SSIM_C2)
    return float((luminance * structure).mean())
