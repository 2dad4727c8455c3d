"""Memory for kernels that reveals elements that were never written, and writes outside of a tensor; and a Triton whose
Gluon is too old."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from wanforge.plugins import warpgroup_attention

GUARD = 256
"""Number of elements before and after each tensor that nothing may change."""


def unlikely(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill fresh memory with poison, between two bands of it that must be intact when the test is over."""
    empty, made = torch.empty, []

    def allocate(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(sizes).numel()
        band = empty(count + 2 * GUARD, dtype=dtype, device=device)
        if band.device.type != "meta":
            band.fill_(unlikely(dtype))
            made.append((band, count))
        return band[GUARD : GUARD + count].view(sizes)

    monkeypatch.setattr(torch, "empty", allocate)
    yield
    monkeypatch.undo()
    for band, count in made:
        for side in (band[:GUARD], band[GUARD + count :]):
            poison = torch.full_like(side, unlikely(band.dtype)).view(torch.uint8)
            assert torch.equal(side.view(torch.uint8), poison), f"written outside a tensor of {count} {band.dtype}"


@pytest.fixture
def older_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let kernels be chosen as with a Triton that compiles none in Gluon."""
    monkeypatch.setattr(warpgroup_attention, "version", lambda package: "3.7.1")
    warpgroup_attention._architectures.cache_clear()
    yield
    warpgroup_attention._architectures.cache_clear()
