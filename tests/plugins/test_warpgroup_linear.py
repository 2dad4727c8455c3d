"""Which kernel multiplies by tiles."""

import pytest
import torch

from wanforge.plugins import warpgroup_attention
from wanforge.plugins.launching.launch import recording
from wanforge.plugins.quantiser.fused import quantise
from wanforge.plugins.w8a8_linear.fused import Weight, linears

WARPGROUPS, OTHERS = "warpgroup_linear.gemm", "w8a8_linear.gemm"


def kernel_of(sm: int, outputs: int, dtype: torch.dtype) -> str:
    """The kernel that a linear launches on an architecture."""
    with torch.device("meta"), recording(sm) as recorded:
        x = quantise(torch.empty(200, 256, dtype=dtype))
        w = quantise(torch.empty(outputs, 256, dtype=dtype))
        linears(x, [Weight(*w, torch.empty(outputs, dtype=dtype))])
    return recorded.launches[-1].kernel.name


@pytest.mark.parametrize(
    ("sm", "outputs", "dtype", "kernel"),
    [
        (90, 512, torch.bfloat16, WARPGROUPS),
        (90, 256, torch.float16, WARPGROUPS),
        (90, 384, torch.bfloat16, OTHERS),  # a program has 256 outputs
        (90, 512, torch.float32, OTHERS),
        (89, 512, torch.bfloat16, OTHERS),
        (100, 512, torch.bfloat16, OTHERS),
    ],
)
def test_the_kernel_follows_from_architecture_outputs_and_type(
    sm: int, outputs: int, dtype: torch.dtype, kernel: str
) -> None:
    assert kernel_of(sm, outputs, dtype) == kernel


def test_older_compilers_get_the_kernel_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warpgroup_attention, "version", lambda package: "3.7.1")
    warpgroup_attention._architectures.cache_clear()
    try:
        assert kernel_of(90, 512, torch.bfloat16) == OTHERS
    finally:
        warpgroup_attention._architectures.cache_clear()
