"""What the ONNX bodies of the ops share: their domain, and the final changes that TensorRT's parser needs.

A body is the op written with standard ONNX operators. ONNX Runtime runs it; TensorRT inlines it where no plugin is
registered. Bodies compute in float32 and return the type of their input, so one body serves every compute type.
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
"""The ONNX domain of the ops and of the functions that their bodies call."""

PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""Node attributes that make TensorRT use the plugin; without them its parser uses the body."""


def function_proto(function: OnnxFunction[Any, Any], name: str | None = None) -> FunctionProto:
    """The body as ONNX stores it, renamed if a name is given. Its bytes are the same in every process.

    TensorRT's parser requires a unique name for every node, in nested graphs too, and a condition for every loop.
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
    """Sort a loop's variables by name: ONNX Script lists them in set order, which differs between processes."""
    body, given = loop.attribute[0].g, list(loop.input[2:])
    order = sorted(range(len(given)), key=given.__getitem__)
    for names in (loop.input, loop.output, body.input, body.output):
        first = len(names) - len(order)
        moved = [deepcopy(names[first + position]) for position in order]
        del names[first:]
        names.extend(moved)


def _number_values(proto: FunctionProto) -> None:
    """Renumber the values that ONNX Script named with a number, in the order in which they are defined."""
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
