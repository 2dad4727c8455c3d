"""The denoiser as one ONNX model: its graphs become functions, and its weights are offsets into the bundle's file.

It is not used in production. It lets onnx's checker, Netron, ONNX Runtime and Polygraphy check, show, run or compare
the whole network at once.
"""

from collections.abc import Mapping, Sequence

import torch
from onnx import ModelProto, NodeProto, helper

from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.tensorfile import TensorFile
from wanforge.exporter.onnx_model import as_function, bodies, external, onnx_model, trace
from wanforge.exporter.tracer import tensor_proto, value_info
from wanforge.plugins.onnx_body import DOMAIN
from wanforge.runtime.dtypes import element_type
from wanforge.runtime.graphs import Graph

INPUTS = ("patches", "sinusoid", "text", "kept_rows", "key_bias", "cos", "sin", "selection")
PIECES = {
    "context": "Context",
    "cross_kv": "CrossKV",
    "time": "Time",
    "stem": "Stem",
    "block": "Block",
    "head": "Head",
}
"""The graphs of the denoiser, and the ONNX functions made of them."""


def whole_network(
    model: ModelConfig, recipe: Recipe, graphs: Mapping[str, Graph], dtype: torch.dtype, weights: TensorFile
) -> ModelProto:
    """Return a denoiser as one ONNX model.

    Its inputs are the inputs of the graphs that no graph produces: ``patches``, ``sinusoid``, ``text``, ``kept_rows``,
    ``key_bias``, ``cos``, ``sin`` and ``selection``. Its output is ``velocity``.
    """
    traced = {name: trace(graphs[name], dtype, weights) for name in PIECES}
    functions = [as_function(traced[name], function) for name, function in PIECES.items()]
    ops = bodies(recipe, [node for graph in traced.values() for node in graph.node])
    nodes = list(_calls(model, graphs))
    inputs = [port for name in PIECES for port in graphs[name].inputs if port.name in INPUTS]
    unique = {port.name: port for port in inputs}
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "dit",
        [value_info(p.name, p.shape, element_type(p.dtype, dtype)) for p in unique.values()],
        [value_info(p.name, p.shape, element_type(p.dtype, dtype)) for p in graphs["head"].outputs],
        [external(name, weights, name, dtype) for name in weights.tensors if name in used],
    )
    return onnx_model(graph, [*ops, *functions])


def _calls(model: ModelConfig, graphs: Mapping[str, Graph]) -> Sequence[NodeProto]:
    nodes: list[NodeProto] = []

    def call(piece: str, inputs: Sequence[str], outputs: Sequence[str], prefix: str = "", label: str = "") -> None:
        weights = [prefix + name for name in graphs[piece].weights]
        function = PIECES[piece]
        nodes.append(helper.make_node(function, [*inputs, *weights], outputs, name=f"{function}{label}", domain=DOMAIN))

    call("time", ["sinusoid"], ["layers", "head_modulation"])
    call("context", ["text"], ["context"])
    call("stem", ["patches"], ["hidden.0"])
    for layer in range(model.dit.num_layers):
        prefix, label = f"blocks.{layer}.", f".{layer}"
        index = helper.make_node("Constant", [], [f"layer{label}"], value=tensor_proto(torch.tensor(layer)))
        pick = helper.make_node("Gather", ["layers", f"layer{label}"], [f"modulation{label}"], axis=0)
        index.name, pick.name = f"layer{label}", f"modulation{label}"
        nodes.extend([index, pick])
        call("cross_kv", ["context", "kept_rows"], [f"keys{label}", f"values{label}"], prefix, label)
        inputs = [f"hidden{label}", f"modulation{label}", f"keys{label}", f"values{label}"]
        call("block", [*inputs, "key_bias", "cos", "sin", "selection"], [f"hidden.{layer + 1}"], prefix, label)
    call("head", [f"hidden.{model.dit.num_layers}", "head_modulation"], ["velocity"], "head.")
    return nodes
