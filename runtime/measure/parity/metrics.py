"""How far two tensors, or two clips, are apart."""

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
    """What a tensor is held to.

    Attributes:
        rms: RMS of the difference over RMS of what was expected.
        max: its largest magnitude, likewise over the RMS of what was expected.
        cosine: of the angle between the two.
        psnr_db: peak signal-to-noise ratio; the peak is the range of what was expected, 255 for frames. Infinite where
            nothing differs.
        nan, inf: numbers that are not, where finite ones were expected; the others are left to the rest.
        ssim: of frames; None for other tensors.
    """

    rms: float
    max: float
    cosine: float
    psnr_db: float
    nan: int = 0
    inf: int = 0
    ssim: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values; JSON has no infinity, so tensors that are equal are null dB apart."""
        return {**asdict(self), "psnr_db": None if math.isinf(self.psnr_db) else self.psnr_db}


def difference(actual: Tensor, expected: Tensor, *, peak: float | None = None) -> Difference:
    """Compare tensors of one shape in float64."""
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
    """RMS of the difference over RMS of what was expected."""
    return difference(actual, expected).rms


def psnr(mean_square: float, peak: float) -> float:
    """Peak signal-to-noise ratio in dB."""
    return math.inf if mean_square == 0 else 10 * math.log10(max(peak, TINY) ** 2 / mean_square)


def clip_difference(actual_THWC: Tensor, expected_THWC: Tensor) -> Difference:
    """Compare two clips of uint8 frames ``[T, H, W, 3]``."""
    found = difference(actual_THWC, expected_THWC, peak=255.0)
    return Difference(**{**asdict(found), "ssim": ssim(actual_THWC, expected_THWC)})


def ssim(actual_THWC: Tensor, expected_THWC: Tensor) -> float:
    """Structural similarity of uint8 frames, the mean over frames, channels and windows that lie inside.

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
