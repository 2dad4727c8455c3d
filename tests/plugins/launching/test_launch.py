"""A launch is recorded, keyed and checked as the compiled code requires."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.launches import gemm_launch, norm_launch
from wanforge.configs.tiles import load_tiles
from wanforge.errors import ResourceError, ShapeError
from wanforge.plugins.launching import launch as launching
from wanforge.plugins.launching.call import Kernel
from wanforge.plugins.launching.grid import evaluate
from wanforge.plugins.launching.launch import Launch, architecture_of, recording, tile_for

KERNEL = Kernel("layer_norm", "norm", ("cdiv(M, 128)", "D // 64"), {"M": "i32", "stride": "i64:16", "eps": "fp32"})


def launch(**changed: object) -> Launch:
    arguments: dict[str, object] = {"x": aligned(64), "y": None, "M": 300, "stride": 64, "eps": 1e-6, "D": 128}
    return Launch(KERNEL, {**arguments, **changed}, 8, 2, 90)  # type: ignore[dict-item]


def aligned(count: int) -> Tensor:
    """Float16 zeros at an address that is a multiple of 16."""
    room = torch.zeros(count + 8, dtype=torch.float16)
    skip = -room.data_ptr() % 16 // 2
    return room[skip : skip + count]


def test_recording_takes_the_tiles_of_the_architecture() -> None:
    tile = tile_for("w8a8_linear.gemm", 89)
    found = gemm_launch(89)
    assert (found.sm, found.num_warps, found.num_stages) == (89, tile.num_warps, tile.num_stages)
    assert tile.blocks
    assert tile.blocks.items() <= found.arguments.items()


def test_recordings_nest_and_leave_nothing_behind() -> None:
    with recording(80) as outer:
        inner = norm_launch(90)
        assert architecture_of(torch.device("meta")) == 80
    assert outer.steps == []
    assert inner.sm == 90
    assert architecture_of(torch.device("cpu")) == launching.INTERPRETED_SM


def test_a_specialisation_sorts_arguments_into_types_and_constants() -> None:
    made = launch().specialisation
    assert made.kernel == "layer_norm.norm"
    assert dict(made.types) == {"M": "i32", "eps": "fp32", "stride": "i64:16", "x": "*fp16"}
    assert dict(made.constants) == {"D": 128, "y": None}


@pytest.mark.parametrize("changed", [{"M": 7}, {"x": aligned(128)}, {"eps": 1e-5}, {"stride": 128}])
def test_values_at_run_time_do_not_change_the_key(changed: dict[str, object]) -> None:
    assert launch(**changed).specialisation.key == launch().specialisation.key


@pytest.mark.parametrize("changed", [{"D": 256}, {"x": torch.zeros(8, dtype=torch.bfloat16)}, {"y": aligned(8)}])
def test_types_and_constants_change_the_key(changed: dict[str, object]) -> None:
    assert launch(**changed).specialisation.key != launch().specialisation.key


@pytest.mark.parametrize("changed", [{"num_warps": 4}, {"num_stages": 3}, {"sm": 80}])
def test_the_tile_and_the_architecture_change_the_key(changed: dict[str, int]) -> None:
    assert replace(launch(), **changed).specialisation.key != launch().specialisation.key  # type: ignore[arg-type]


def test_the_order_of_arguments_does_not_change_the_key() -> None:
    backwards = replace(launch(), arguments=dict(reversed(list(launch().arguments.items()))))
    assert backwards.specialisation.key == launch().specialisation.key


def test_the_grid_rounds_up_and_has_three_axes() -> None:
    assert launch(M=300).grid == (3, 2, 1)
    assert launch(M=256).grid == (2, 2, 1)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("a", 10),
        ("cdiv(a, 3)", 4),
        ("cdiv(9, 3)", 3),
        ("2 * cdiv(a + 1, b) - 1", 7),
        ("a // b", 3),
        ("max(a, b)", 10),
        ("min(a, b + 8)", 10),
    ],
)
def test_a_grid_rule_is_arithmetic(expression: str, value: int) -> None:
    assert evaluate(expression, {"a": 10, "b": 3}) == value


@pytest.mark.parametrize(
    "expression", ["__import__('os')", "a.b", "pow(a, b)", "'a'", "a if b else 1", "a % b", "a + c"]
)
def test_a_grid_rule_is_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError, match="a grid rule cannot contain"):
        evaluate(expression, {"a": 10, "b": 3})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": aligned(64)[1:]}, "x begins 2 bytes after a multiple of 16 bytes; give a copy of it$"),
        ({"y": aligned(64)[4:]}, "y begins 8 bytes after a multiple of 16 bytes; give a copy of it$"),
        ({"stride": 72}, "stride is 72, which is not a multiple of 16"),
        ({"M": 2**31}, "M is 2147483648, which does not fit a 32-bit integer"),
        ({"y": torch.empty(4, device="meta")}, "tensors are on cpu and meta"),
    ],
)
def test_refuses_what_compiled_code_would_misread(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        launch(**changed).check_arguments()


def test_takes_what_is_aligned_and_fits() -> None:
    launch(y=aligned(64)[8:], M=2**31 - 1, stride=2**40).check_arguments()


def test_an_architecture_without_tiles_is_refused_by_name() -> None:
    with pytest.raises(ResourceError, match=r"no tiles for layer_norm\.norm on sm_75; there are some for sm_80, sm_86"):
        tile_for("layer_norm.norm", 75)


def test_every_kernel_has_tiles_once_for_each_architecture() -> None:
    served = {"tensor_memory_linear": [100], "warp_attention": [89, 120], "warp_linear": [120]}
    served |= {"tensor_memory_attention": [100]}
    served |= {room: [90] for room in ("warpgroup_attention", "warpgroup_linear")}
    served |= {room: [80, 120] for room in ("block_quantiser", "nvfp4_linear")}  # sm_80 stands for the interpreter
    for kernel, rows in load_tiles().items():
        sms = [sm for row in rows for sm in row.sms]
        assert sorted(sms) == served.get(kernel.partition(".")[0], [80, 86, 89, 90, 100, 120])
