"""Helpers for the tests of kernels, which run with a GPU or without.

Without a GPU Triton's interpreter runs the kernels, in float32 and float16, because it is unsound in bfloat16.
"""

import math
import mmap
from collections.abc import Mapping

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
HALF_SPACING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of one rounding."""

FLOAT32_ERROR = 2e-6
"""Relative RMS error of float32 arithmetic in another order, or with a GPU's exp2: some tens of spacings."""


def rounding_error(dtype: torch.dtype, roundings: float = 1.0) -> float:
    """The largest relative RMS error that `roundings` additional or omitted roundings can cause."""
    return FLOAT32_ERROR if dtype == torch.float32 else roundings * HALF_SPACING[dtype]


def flipped_error(dtype: torch.dtype, roundings: float) -> float:
    """The largest relative RMS error that so many roundings of a float32 sum can cause: in the share of values that lie
    close to a tie of their own type, they decide to which side a value is rounded."""
    share = roundings * HALF_SPACING[torch.float32] / HALF_SPACING[dtype]
    return math.sqrt(share) * 2 * HALF_SPACING[dtype]


def cases(shapes: Mapping[str, tuple[int, ...]], *quick: str) -> list[ParameterSet]:
    """Named shapes as parameters of a test; all except those in `quick` are marked slow."""
    return [
        pytest.param(shape, id=name, marks=() if name in quick else pytest.mark.slow) for name, shape in shapes.items()
    ]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that are the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def strided(x_LD: Tensor) -> Tensor:
    """The same rows with other values between them."""
    wide = torch.full((x_LD.shape[0], x_LD.shape[1] + 48), 1e4, dtype=x_LD.dtype, device=x_LD.device)
    wide[:, 16:-32] = x_LD
    return wide[:, 16:-32]


def far_apart(x_LD: Tensor) -> Tensor:
    """The same rows 2^24 elements apart, so that the last of more than 128 rows lies beyond 2^31 elements.

    On the CPU most of this memory is never touched, so it is never allocated.
    """
    rows, width = x_LD.shape
    stride = 2**24
    if DEVICE == "cpu":
        size = rows * stride * x_LD.dtype.itemsize
        flat = torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=x_LD.dtype)
    else:
        flat = torch.zeros(rows * stride, dtype=x_LD.dtype, device=DEVICE)
    apart = flat.view(rows, stride)[:, :width]
    apart.copy_(x_LD)
    return apart
