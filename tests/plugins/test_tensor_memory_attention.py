"""Where products go to tensor memory, which kernel computes sparse attention."""

import pytest
import torch

from tests.plugins.test_warp_attention import BLOCKS, OTHERS, kernels_of
from wanforge.plugins.sparse_linear_attention.reference import Blocks

TENSOR_MEMORY = "tensor_memory_attention.attention"


@pytest.mark.parametrize(
    ("sm", "dtype", "blocks", "kernel"),
    [
        (100, torch.bfloat16, BLOCKS, TENSOR_MEMORY),
        (100, torch.float16, BLOCKS, TENSOR_MEMORY),
        (100, torch.float32, BLOCKS, OTHERS),
        (100, torch.bfloat16, Blocks(128, 64, "sla"), OTHERS),
        (100, torch.bfloat16, Blocks(128, 64, "sage_fp8", pv_sum="fp16"), OTHERS),
        (90, torch.bfloat16, BLOCKS, "warpgroup_attention.attention"),
        (120, torch.bfloat16, BLOCKS, "warp_attention.attention"),
        (80, torch.bfloat16, Blocks(128, 64, "sage_fp16"), OTHERS),
    ],
)
def test_the_kernel_follows_from_architecture_type_and_arithmetic(
    sm: int, dtype: torch.dtype, blocks: Blocks, kernel: str
) -> None:
    assert kernels_of(sm, dtype, blocks) == {kernel}


@pytest.mark.usefixtures("older_triton")
def test_older_compilers_get_the_kernel_in_triton() -> None:
    assert kernels_of(100) == {OTHERS}
