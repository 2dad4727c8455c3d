"""TensorRT in tests: opened where it is installed, skipped with the reason where it is not."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from wanforge.errors import ResourceError
from wanforge.plugins.onnx_body import DOMAIN, OPSET, PLUGIN, VERSION
from wanforge.plugins.tensorrt.library import RTX, Library, open_library

ELEMENTS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
}
Port = tuple[str, str, Sequence[int | str]]


def rtx() -> Library:
    """Open TensorRT-RTX, or skip the test."""
    try:
        return open_library(RTX)
    except ResourceError as missing:
        pytest.skip(str(missing))


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: object) -> NodeProto:
    """A call of one of the project's ops."""
    return helper.make_node(op, inputs, outputs, name=f"{op}_0", domain=DOMAIN, **attributes, **PLUGIN)


def model(nodes: Sequence[NodeProto], inputs: Sequence[Port], outputs: Sequence[Port]) -> ModelProto:
    """A graph without function bodies: only a plugin can make it compile."""
    infos = [
        [helper.make_tensor_value_info(name, ELEMENTS[dtype], shape) for name, dtype, shape in ports]
        for ports in (inputs, outputs)
    ]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(helper.make_graph(nodes, "test", *infos), opset_imports=opsets, ir_version=10)


def linear(folder: Path, *, x: str = "bfloat16", bias: str = "", rows: int | str = "rows", outputs: int = 256) -> Path:
    """Write the file of one W8A8 linear with 256 inputs."""
    inputs: list[Port] = [
        ("x", x, (1, rows, 256)),
        ("w", "int8", (outputs, 256)),
        ("scale", "float32", (-(-outputs // 128), 2)),
        ("bias", bias or x, (outputs,)),
    ]
    path = folder / "linear.onnx"
    call = node("W8A8Linear", [name for name, *_ in inputs], ["y"])
    onnx.save(model([call], inputs, [("y", x, (1, rows, outputs))]), str(path))
    return path
