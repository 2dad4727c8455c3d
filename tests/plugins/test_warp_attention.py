"""Where warps multiply on their own, which kernel computes sparse attention."""

import pytest
import torch

from wanforge.plugins.launching.launch import recording
from wanforge.plugins.quantiser.fused import empty_quantised
from wanforge.plugins.sparse_linear_attention.fused import sparse_linear_attention, sparse_linear_attention_into
from wanforge.plugins.sparse_linear_attention.reference import Blocks

WARPS, OTHERS = "warp_attention.attention", "sparse_linear_attention.attention"
BLOCKS = Blocks(128, 64, "sage_fp8")


def kernels_of(sm: int, dtype: torch.dtype = torch.bfloat16, blocks: Blocks = BLOCKS) -> set[str]:
    """The kernels that attention launches on an architecture, with a quantised output and without."""
    found = set()
    with torch.device("meta"), recording(sm) as recorded:
        q, proj, bias = torch.empty(200, 256, dtype=dtype), torch.empty(128, 128), torch.empty(128)
        sparse_linear_attention(q, q, q, 2, proj, bias, blocks)
        found.add(recorded.launches[-1].kernel.name)
        sparse_linear_attention_into(empty_quantised(200, 256, q.device), (q, q, q), 2, (proj, bias), blocks)
        found.add(recorded.launches[-1].kernel.name)
    return found


@pytest.mark.parametrize(
    ("sm", "dtype", "blocks", "kernel"),
    [
        (89, torch.bfloat16, BLOCKS, WARPS),
        (120, torch.bfloat16, BLOCKS, WARPS),
        (120, torch.float16, BLOCKS, WARPS),
        (120, torch.float32, BLOCKS, OTHERS),
        (120, torch.bfloat16, Blocks(128, 64, "sage_fp8", pv_sum="fp16"), OTHERS),
        (120, torch.bfloat16, Blocks(128, 64, "sla"), OTHERS),
        (86, torch.bfloat16, Blocks(128, 64, "sage_fp16"), OTHERS),
    ],
)
def test_the_kernel_follows_from_architecture_type_and_arithmetic(
    sm: int, dtype: torch.dtype, blocks: Blocks, kernel: str
) -> None:
    assert kernels_of(sm, dtype, blocks) == {kernel}


@pytest.mark.usefixtures("older_triton")
def test_older_compilers_get_the_kernel_in_triton() -> None:
    assert kernels_of(120) == {OTHERS}
