"""What the ONNX bodies of the ops share: their domain, and the finishing touches that TensorRT's parser asks for.

A body is the op in ONNX's own vocabulary. ONNX Runtime runs it; TensorRT inlines it where no plugin is registered.
Bodies compute in float32 and return the type they were given, so one body serves every compute type.
"""

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import count
from typing import Any

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper
from onnxscript import OnnxFunction
from onnxscript.values import Opset

DOMAIN = "wanforge"
VERSION = 1
OPSET = 23

GRAPH = AttributeProto.GRAPH
FLOAT = TensorProto.FLOAT
FLOAT16 = TensorProto.FLOAT16
FLOAT8 = TensorProto.FLOAT8E4M3FN

ops = Opset(DOMAIN, VERSION)
"""The domain of the ops and of the functions their bodies are made of."""

PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""Attributes of a node that let TensorRT take the plugin; without them its parser takes the body."""


def function_proto(function: OnnxFunction[Any, Any], name: str | None = None) -> FunctionProto:
    """The body as ONNX stores it, under another name where one is given, and the same bytes in every process.

    TensorRT's parser wants every node named apart, in nested graphs too, and a loop to have a condition.
    """
    proto = function.to_function_proto()
    proto.name = name or proto.name
    for opset in proto.opset_import:
        if opset.domain == "":
            opset.version = OPSET
    for node in proto.node:
        if node.op_type == "Loop":
            _sort_variables(node)
    _number_values(proto)
    nodes = [node for original in proto.node for node in _with_condition(original)]
    del proto.node[:]
    proto.node.extend(nodes)
    for number, node in enumerate(_walk(proto.node)):
        node.name = f"{proto.name}_{number}"
    return proto


def _sort_variables(loop: NodeProto) -> None:
    """Sort a loop's variables by name. ONNX Script lists them in the order of a set, different in each process."""
    body, given = loop.attribute[0].g, list(loop.input[2:])
    order = sorted(range(len(given)), key=given.__getitem__)
    for names in (loop.input, loop.output, body.input, body.output):
        first = len(names) - len(order)
        moved = [deepcopy(names[first + position]) for position in order]
        del names[first:]
        names.extend(moved)


def _number_values(proto: FunctionProto) -> None:
    """Number the values that ONNX Script told apart by a number, in the order in which they are defined."""
    numbers, renamed = count(), dict[str, str]()
    nodes = list(_walk(proto.node))
    bodies = [attribute.g for node in nodes for attribute in node.attribute if attribute.type == GRAPH]
    defined = [name for node in nodes for name in (*_body_inputs(node), *node.output)]
    for name in dict.fromkeys(defined):
        stem = re.fullmatch(r"(.+)_\d+", name)
        if stem and name not in proto.output:
            renamed[name] = f"{stem[1]}_{next(numbers)}"
    for names in (names for node in nodes for names in (node.input, node.output)):
        names[:] = [renamed.get(name, name) for name in names]
    for value in (value for body in bodies for values in (body.input, body.output) for value in values):
        value.name = renamed.get(value.name, value.name)


def _body_inputs(node: NodeProto) -> list[str]:
    return [value.name for attribute in node.attribute if attribute.type == GRAPH for value in attribute.g.input]


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
            if attribute.type == GRAPH:
                yield from _walk(attribute.g.node)
