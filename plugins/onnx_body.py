"""What the ONNX bodies of the ops share: their domain, and the finishing touches that TensorRT's parser asks for.

A body is the op in ONNX's own vocabulary. ONNX Runtime runs it; TensorRT inlines it where no plugin is registered.
Bodies compute in float32 and return the type they were given, so one body serves every compute type.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import onnx
from onnx import FunctionProto, NodeProto, TensorProto, helper
from onnxscript import OnnxFunction
from onnxscript.values import Opset

DOMAIN = "wanforge"
VERSION = 1
OPSET = 23

FLOAT = TensorProto.FLOAT
FLOAT16 = TensorProto.FLOAT16
FLOAT8 = TensorProto.FLOAT8E4M3FN

ops = Opset(DOMAIN, VERSION)
"""The domain of the ops and of the functions their bodies are made of."""

PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""Attributes of a node that let TensorRT take the plugin; without them its parser takes the body."""


def function_proto(function: OnnxFunction[Any, Any], name: str | None = None) -> FunctionProto:
    """The body as ONNX stores it, under another name where one is given.

    TensorRT's parser wants every node named apart, in nested graphs too, and a loop to have a condition.
    """
    proto = function.to_function_proto()
    proto.name = name or proto.name
    for opset in proto.opset_import:
        if opset.domain == "":
            opset.version = OPSET
    nodes = [node for original in proto.node for node in _with_condition(original)]
    del proto.node[:]
    proto.node.extend(nodes)
    for number, node in enumerate(_walk(proto.node)):
        node.name = f"{proto.name}_{number}"
    return proto


def _with_condition(node: NodeProto) -> Sequence[NodeProto]:
    if node.op_type != "Loop" or node.input[1]:
        return [node]
    go_on = f"{node.output[0]}_go_on"
    node.input[1] = go_on
    return [
        helper.make_node("Constant", [], [go_on], value=helper.make_tensor("", TensorProto.BOOL, [], [True])),
        node,
    ]


def _walk(nodes: Iterable[NodeProto]) -> Iterable[NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _walk(attribute.g.node)
