"""Which kernel multiplies by tiles."""

import pytest
import torch

from wanforge.errors import ShapeError
from wanforge.plugins.launching.launch import recording
from wanforge.plugins.quantiser.fused import quantise
from wanforge.plugins.w8a8_linear.fused import Weight, linears
from wanforge.plugins.warpgroup_attention import serves
from wanforge.plugins.warpgroup_linear.maps import row_map, weight_map

WARPGROUPS, TENSOR_MEMORY, OTHERS = "warpgroup_linear.gemm", "tensor_memory_linear.gemm", "w8a8_linear.gemm"


def kernel_of(sm: int, outputs: int, dtype: torch.dtype, inputs: int = 384) -> str:
    """The kernel that a linear launches on an architecture."""
    with torch.device("meta"), recording(sm) as recorded:
        x = quantise(torch.empty(200, inputs, dtype=dtype))
        w = quantise(torch.empty(outputs, inputs, dtype=dtype))
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
        (100, 512, torch.bfloat16, TENSOR_MEMORY),
        (100, 256, torch.float16, TENSOR_MEMORY),
        (100, 384, torch.bfloat16, OTHERS),
        (100, 512, torch.float32, OTHERS),
    ],
)
def test_the_kernel_follows_from_architecture_outputs_and_type(
    sm: int, outputs: int, dtype: torch.dtype, kernel: str
) -> None:
    assert kernel_of(sm, outputs, dtype) == kernel


@pytest.mark.parametrize(("sm", "kernel", "most"), [(90, WARPGROUPS, 16384), (100, TENSOR_MEMORY, 32768)])
def test_a_program_has_threads_for_the_scales_of_each_slab(sm: int, kernel: str, most: int) -> None:
    assert kernel_of(sm, 256, torch.bfloat16, most) == kernel
    assert kernel_of(sm, 256, torch.bfloat16, most + 128) == OTHERS


@pytest.mark.parametrize(("sm", "kernel", "fewest"), [(90, WARPGROUPS, 384), (100, TENSOR_MEMORY, 128)])
def test_tiles_have_as_many_slabs_as_are_copied_ahead(sm: int, kernel: str, fewest: int) -> None:
    assert kernel_of(sm, 256, torch.bfloat16, fewest) == kernel


def test_tiles_with_fewer_slabs_than_warpgroups_copy_ahead_are_left_to_the_kernel_in_triton() -> None:
    assert kernel_of(90, 256, torch.bfloat16, 256) == OTHERS


def test_maps_are_of_rows_as_they_lie() -> None:
    wide = torch.zeros(256, 512, dtype=torch.int8)
    assert row_map(wide[:, 128:384]).strides == (512, 1)
    assert weight_map(wide).strides == (32 * 512, 2 * 512, 8 * 512, 512, 1)
    with pytest.raises(ShapeError, match=r"weight must be contiguous; found \(256, 256\) with strides \(512, 1\)"):
        weight_map(wide[:, 128:384])


def test_a_kernel_without_tiles_serves_no_device() -> None:
    with recording(90):
        assert serves(torch.device("meta"), WARPGROUPS)
        assert not serves(torch.device("meta"), "warpgroup_linear.removed")


@pytest.mark.usefixtures("older_triton")
@pytest.mark.parametrize("sm", [90, 100])
def test_older_compilers_get_the_kernel_in_triton(sm: int) -> None:
    assert kernel_of(sm, 512, torch.bfloat16) == OTHERS
