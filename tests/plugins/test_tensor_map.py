"""Tensor maps: which there are, what the driver is asked to encode, and where kernels find them."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.launches import EncodingCuda, NotingDriver
from tools.ptx.tensor_maps import decoded
from wanforge.errors import ResourceError, ShapeError
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.launching.driver import LoadedLaunches
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.launching.plan import Address, PlannedLaunch, plan
from wanforge.plugins.tensor_map.encoding import (
    ENCODE,
    LINES_OF_128B,
    NOT_INTERLEAVED,
    SWIZZLES,
    ZEROS,
    MapEncoder,
    TensorParameter,
)
from wanforge.plugins.tensor_map.tensor_map import DATA_TYPES, TensorMap
from wanforge.runtime.measure.requests.overhead import IdleLauncher

WEIGHT = torch.zeros(256, 512, dtype=torch.int8)


def test_a_matrix_and_a_view_of_five_dimensions_have_maps() -> None:
    rows = TensorMap(WEIGHT, (256, 512), (512, 1), (128, 128))
    assert (rows.sizes, rows.box) == ((256, 512), (128, 128))
    TensorMap(WEIGHT, (8, 4, 4, 2, 512), (32 * 512, 2 * 512, 8 * 512, 512, 1), (8, 4, 4, 2, 128))
    TensorMap(WEIGHT.view(torch.bfloat16)[128:], (128, 256), (256, 1), (64, 64))
    assert (rows.swizzled, TensorMap(WEIGHT, (256, 512), (512, 1), (128, 64)).swizzled) == (128, 64)


@pytest.mark.parametrize(
    ("sizes", "strides", "box", "why"),
    [
        ((256, 512), (512, 1), (128,), "as many sizes"),
        ((), (), (), "1 to 5"),
        ((1,) * 6, (16,) * 5 + (1,), (1,) * 5 + (128,), "1 to 5"),
        ((0, 512), (512, 1), (128, 128), "sizes must be 1"),
        ((256, 512), (512, 2), (128, 128), "last stride must be 1"),
        ((256, 504), (504, 1), (128, 128), "multiples of 16"),
        ((256, 512), (0, 1), (128, 128), "multiples of 16"),
        ((256, 512), (512, 1), (257, 128), "1 to 256"),
        ((256, 512), (512, 1), (0, 128), "1 to 256"),
        ((256, 512), (512, 1), (128, 96), "must be 64 or 128"),
        ((257, 512), (512, 1), (128, 128), "ends at element 131583, but the tensor's memory has 131072"),
    ],
)
def test_what_the_hardware_cannot_copy_has_no_map(
    sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], why: str
) -> None:
    with pytest.raises(ShapeError, match=why) as caught:
        TensorMap(WEIGHT, sizes, strides, box)
    assert str(sizes) in str(caught.value)
    assert str(box) in str(caught.value)


def test_elements_of_other_sizes_have_no_map() -> None:
    with pytest.raises(ShapeError, match=r"torch\.int64 .*elements must be torch\.uint8, torch\.int8"):
        TensorMap(torch.zeros(16, 16, dtype=torch.int64), (16, 16), (16, 1), (16, 16))


def test_a_view_that_begins_between_pieces_has_no_map() -> None:
    for device in ("cpu", "meta"):
        tensor = torch.empty(1024, dtype=torch.int8, device=device)[8:]
        with pytest.raises(ShapeError, match="begins 8 bytes after a multiple of 16 bytes; give"):
            TensorMap(tensor, (7, 128), (128, 1), (8, 128))


KERNEL = Kernel("layer_norm", "norm", ("cdiv(M, 128)",), {"M": "i32"})
VIEW = TensorMap(WEIGHT, (8, 4, 4, 2, 512), (32 * 512, 2 * 512, 8 * 512, 512, 1), (8, 4, 4, 2, 128))


def launch_of(x: TensorMap, y: torch.Tensor | None = None) -> Launch:
    """A launch with a map, a view of five dimensions, and what else kernels take."""
    y = torch.zeros(64, dtype=torch.float16, device=x.tensor.device) if y is None else y
    view = replace(VIEW, tensor=WEIGHT.to(x.tensor.device))
    return Launch(KERNEL, {"x": x, "y": y, "absent": None, "M": 300, "view": view}, 4, 2, 90)


def rows_of(x: torch.Tensor) -> TensorMap:
    return TensorMap(x, tuple(x.shape), x.stride(), (64, 128 // x.element_size()))


def test_a_kernel_is_given_maps_and_their_numbers_in_the_compiled_order() -> None:
    x, driver = torch.zeros(300, 256, dtype=torch.bfloat16), NotingDriver()
    launch = launch_of(rows_of(x))
    IdleLauncher(driver)(launch)
    ((kernel, grid, values, _),) = driver.launches
    assert grid == (3, 1, 1)
    assert [name for name, _ in kernel.parameters] == [
        "M",
        *("view", *(f"view.sizes.{i}" for i in range(5)), *(f"view.strides.{i}" for i in range(5))),
        *("x", "x.sizes.0", "x.sizes.1", "x.strides.0", "x.strides.1"),
        "y",
    ]
    y = launch.arguments["y"]
    assert isinstance(y, torch.Tensor)
    assert [value for value in values if not isinstance(value, bytes)] == [
        *(300, *VIEW.sizes, *VIEW.strides),
        *(300, 256, 256, 1),
        y.data_ptr(),
    ]
    # Innermost first, and strides in bytes.
    assert decoded(values[12]) == (2, x.data_ptr(), (256, 300), (512,), (64, 64), 128)
    assert decoded(values[1]) == (
        *(1, WEIGHT.data_ptr(), (512, 2, 4, 4, 8)),
        *((512, 8 * 512, 2 * 512, 32 * 512), (128, 2, 4, 4, 8), 128),
    )


def test_the_driver_is_asked_to_swizzle_and_to_fill_with_zeros() -> None:
    asked: list[tuple[int, ...]] = []

    @ENCODE
    def note(place: int, data_type: int, rank: int, address: int, *lists_and_modes: Any) -> int:
        *lists, interleave, swizzle, promotion, fill = lists_and_modes
        asked.append((data_type, rank, *lists[-1][:rank], interleave, swizzle, promotion, fill))
        return 0

    cuda = SimpleNamespace(cuGetProcAddress=lambda *given: (0, ctypes.cast(note, ctypes.c_void_p).value, 0))
    IdleLauncher(NotingDriver(encoder=MapEncoder(cuda)))(
        launch_of(rows_of(torch.zeros(300, 256, dtype=torch.bfloat16)))
    )
    assert asked == [(0, 5, 1, 1, 1, 1, 1, 0, 3, 2, 0), (9, 2, 1, 1, 0, 3, 2, 0)]
    asked.clear()
    narrow = torch.zeros(128, 192, dtype=torch.float8_e4m3fn)
    IdleLauncher(NotingDriver(encoder=MapEncoder(cuda)))(launch_of(TensorMap(narrow, (128, 192), (192, 1), (128, 64))))
    assert asked[1] == (0, 2, 1, 1, 0, 2, 2, 0)


def test_numbers_are_those_of_the_drivers_enumerations() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    names = dict.fromkeys((torch.uint8, torch.int8, torch.float8_e4m3fn), "UINT8") | {torch.int32: "INT32"}
    names |= {torch.float16: "FLOAT16", torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16"}
    types = driver.CUtensorMapDataType
    assert {dtype: getattr(types, f"CU_TENSOR_MAP_DATA_TYPE_{name}") for dtype, name in names.items()} == DATA_TYPES
    assert (
        *(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,),
        *(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,),
        *(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,),
        *(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,),
        *(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,),
    ) == (NOT_INTERLEAVED, SWIZZLES[64], SWIZZLES[128], LINES_OF_128B, ZEROS)


def test_maps_are_encoded_once_for_each_place_of_their_tensors() -> None:
    encoded: list[tuple[str, int]] = []

    class Counting(MapEncoder):
        def __call__(self, parameter: TensorParameter, address: int, place: int) -> None:
            encoded.append((parameter.name, address))
            super().__call__(parameter, address, place)

    driver = NotingDriver(encoder=Counting(EncodingCuda()))
    x, y = torch.empty(300, 256, device="meta", dtype=torch.int8), torch.empty(64, device="meta")
    planned = PlannedLaunch(
        launch_of(rows_of(x), y), {"x": Address(0, 0), "y": Address(1, 0), "view": Address(2, 1 << 16)}
    )
    loaded = LoadedLaunches(IdleLauncher(driver), torch.device("cpu"), [planned, planned])
    here, there = [1 << 20, 1 << 21, 1 << 22], [1 << 20, 1 << 21, 1 << 23]
    for bases in (here, there, here, there, here):
        loaded.put(bases, 0)
    view, other = (1 << 22) + (1 << 16), (1 << 23) + (1 << 16)
    assert encoded == [
        *(2 * [("view", view), ("x", 1 << 20)]),
        *(2 * [("view", other), ("x", 1 << 20)]),
    ]
    found = [(decoded(told.values[12]).address, decoded(told.values[1]).address) for told in driver.launches]
    assert found == [
        *(2 * [(1 << 20, view)] + 2 * [(1 << 20, other)]),
        *(2 * [(1 << 20, view)] + 2 * [(1 << 20, other)] + 2 * [(1 << 20, view)]),
    ]


def test_a_tensor_that_comes_to_lie_between_pieces_is_refused() -> None:
    x = torch.empty(300, 256, device="meta", dtype=torch.int8)
    planned = PlannedLaunch(launch_of(rows_of(x)), {name: Address(0, 0) for name in ("x", "y", "view")})
    with pytest.raises(ShapeError, match=r"layer_norm\.norm: .* begins 8 bytes after a multiple of 16"):
        LoadedLaunches(IdleLauncher(NotingDriver()), torch.device("cpu"), [planned]).put([8], 0)


def test_what_the_driver_refuses_is_told() -> None:
    cuda = SimpleNamespace(
        cuGetProcAddress=EncodingCuda().cuGetProcAddress,
        CUresult=lambda status: SimpleNamespace(name=f"CUDA_ERROR_INVALID_VALUE ({status})"),
    )
    parameter = TensorParameter("layer_norm.norm", "x", VIEW)
    refused = r"refuses the map of x, torch\.int8 at 0x1000 .*INVALID_VALUE \(1\)"
    with pytest.raises(
        ResourceError, match=rf"{refused}.* backend torch, or remove layer_norm\.norm from configs/tiles"
    ):
        MapEncoder(cuda)(parameter, 4096, 32)
    none = SimpleNamespace(cuGetProcAddress=lambda *given: (0, 0, 1))
    with pytest.raises(ResourceError, match=r"NVIDIA driver .* CUDA 12\.0 or newer"):
        MapEncoder(none)(parameter, 4096, 64)


def test_a_plan_knows_where_the_tensors_of_maps_lie() -> None:
    x = torch.empty(301, 256, dtype=torch.int8, device="meta")

    def run(given: Sequence[torch.Tensor]) -> torch.Tensor:
        made = torch.empty(64, 256, dtype=torch.int8)
        KERNEL(x=rows_of(given[0][1:]), made=made, M=300, D=1)
        y = torch.empty(128)
        KERNEL(x=rows_of(made), y=y, M=300, D=1)
        return y

    made = plan(run, [x], 90)
    first, second = made.launches
    assert first.addresses == {"x": Address(0, 256), "made": Address(2, 0)}
    assert second.addresses == {"x": Address(2, 0), "y": Address(1, 0)}
    assert made.workspace_bytes == 64 * 256
    types = dict(second.launch.specialisation.types)
    assert types["x"] == "tensordesc<i8[64,128],NVMMASharedLayout(128, 8, 2)>"
    # The box and the number of dimensions are compiled, but not the sizes.
    assert dict(first.launch.specialisation.types)["x"] == types["x"]


def test_a_launch_on_other_tensors_has_the_same_maps_of_them() -> None:
    launch = launch_of(rows_of(torch.zeros(300, 256, dtype=torch.int8)))
    blanks = {name: tensor.to("meta") for name, tensor in launch.tensors.items()}
    other = launch.on(blanks)
    assert other.specialisation == launch.specialisation
    assert {name: tensor.device.type for name, tensor in other.tensors.items()} == dict.fromkeys(blanks, "meta")
