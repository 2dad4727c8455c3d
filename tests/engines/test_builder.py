"""Graphs are compiled, or refused with the reason."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.tensorrt_flavours import linear, rtx
from wanforge.engines.builder import BuildJob, build, layers
from wanforge.engines.sizes import ShapeRange
from wanforge.errors import WanforgeError

STATIC = ShapeRange((1, 300, 256), (1, 300, 256), (1, 300, 256))
TABLE = """Layers:
Name: gemm, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [1,2], Datatype: Float }, { Name: b, Datatype: Half }], \
Constants: [ { Name: c, Datatype: Int8 }], Outputs: [ { Name: y, Datatype: BFloat16 }], TacticName: mm, StreamId: 0
Name: op, LayerType: custom_layer, Inputs: [ { Name: a, Datatype: Half }], \
Outputs: [ { Name: y, Datatype: Half }], StreamId: 0

I/O Tensors:
 Name: a, IOMode: Input, DataType: Float
"""


def job(folder: Path, x: ShapeRange = STATIC) -> BuildJob:
    return BuildJob(linear(folder), {"x": x})


@pytest.mark.parametrize("sms", [[120], [80, 86, 89, 120]])
def test_an_engine_serves_every_architecture_asked_for(sms: list[int], tmp_path: Path) -> None:
    seen = []
    built = build(rtx(), job(tmp_path), sms, progress=lambda *counts: seen.append(counts))
    (layer,) = built.layers
    assert layer.is_plugin
    assert layer.inputs == ("BFloat16", "Int8", "Float", "BFloat16")
    assert layer.outputs == ("BFloat16", "UInt8")  # the second is the workspace
    assert built.plugin_nodes == 1
    launched = [(launch.sm, launch.kernel.function) for launch in built.launches(sms)]
    assert launched == [(sm, function) for sm in sms for function in ("quantise", "gemm")]
    assert built.engine_bytes
    assert seen
    assert all(0 < done <= total for _, done, total, *_ in seen)


def test_a_range_of_rows_is_compiled_for_all_of_them(tmp_path: Path) -> None:
    shapes = ShapeRange((1, 1, 256), (1, 300, 256), (1, 4096, 256))
    few, many = (build(rtx(), job(tmp_path, x), [89]) for x in (STATIC, shapes))
    assert sum(layer.is_plugin for layer in many.layers) == 1
    assert many.activation_bytes > few.activation_bytes


@pytest.mark.parametrize(
    ("shape", "said"),
    [((1, 300, 128), r"x is \(1, -1, 256\), which cannot be \(1, 300, 128\)"), ((300, 256), "which cannot be")],
)
def test_a_profile_for_other_shapes_is_refused(shape: tuple[int, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(WanforgeError, match=said):
        build(rtx(), job(tmp_path, ShapeRange(shape, shape, shape)), [120])


def test_a_missing_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WanforgeError, match="no shape is given for x"):
        build(rtx(), BuildJob(linear(tmp_path), {}), [120])


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(WanforgeError, match=r"cannot read broken\.onnx: "):
        build(rtx(), BuildJob(path, {}), [120])


def test_a_node_without_its_plugin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WanforgeError, match=r"cannot read linear\.onnx: .*Plugin not found"):
        build(rtx(), job(tmp_path), [120], plugins=False)


def test_what_a_plugin_refuses_ends_the_build(tmp_path: Path) -> None:
    with pytest.raises(WanforgeError, match="W8A8Linear: bias is float16, but must be bfloat16"):
        build(rtx(), replace(job(tmp_path), onnx=linear(tmp_path, bias="float16")), [120])


def test_the_table_is_read() -> None:
    product, plugin = layers(TABLE)
    assert (product.name, product.kind, product.tactic) == ("gemm", "gemm", "mm")
    assert (product.inputs, product.constants, product.outputs) == (("Float", "Half"), ("Int8",), ("BFloat16",))
    assert product.is_product
    assert plugin.is_plugin
    assert not plugin.is_product


def test_constants_cost_memory() -> None:
    small, large = (BuildJob(Path(), {}, size).needed_bytes for size in (0, 1_000_000_000))
    assert large - small == 3_100_000_000
