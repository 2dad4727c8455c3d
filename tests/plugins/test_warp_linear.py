"""Where warps multiply on their own, which kernel multiplies by tiles."""

import pytest
import torch

from wanforge.plugins.launching.launch import recording
from wanforge.plugins.quantiser.fused import quantise
from wanforge.plugins.w8a8_linear.fused import Weight, linears

WARPS, OTHERS = "warp_linear.gemm", "w8a8_linear.gemm"


def kernel_of(sm: int, inputs: int = 256, dtype: torch.dtype = torch.bfloat16) -> str:
    """The kernel that a linear launches on an architecture."""
    with torch.device("meta"), recording(sm) as recorded:
        x = quantise(torch.empty(200, inputs, dtype=dtype))
        linears(x, [Weight(*quantise(torch.empty(384, inputs, dtype=dtype)), torch.empty(384, dtype=dtype))])
    return recorded.launches[-1].kernel.name


@pytest.mark.parametrize(
    ("sm", "inputs", "dtype", "kernel"),
    [
        (120, 256, torch.bfloat16, WARPS),
        (120, 16384, torch.float16, WARPS),
        (120, 16512, torch.float16, OTHERS),  # more slabs than a program has threads, which load their scales
        (120, 256, torch.float32, OTHERS),
        (89, 256, torch.bfloat16, OTHERS),
    ],
)
def test_the_kernel_follows_from_architecture_inputs_and_type(
    sm: int, inputs: int, dtype: torch.dtype, kernel: str
) -> None:
    assert kernel_of(sm, inputs, dtype) == kernel


@pytest.mark.usefixtures("older_triton")
def test_older_compilers_get_the_kernel_in_triton() -> None:
    assert kernel_of(120) == OTHERS
