"""Turn one graph of a request into one ONNX model."""

from collections.abc import Mapping, Sequence

import onnx
import torch
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, helper

import wanforge.exporter.lowerings  # noqa: F401  fills the table of the tracer
from wanforge.configs.model import DiTConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.dtypes import BY_STORED, dtype_called
from wanforge.engines.bundle.manifest import GraphRecord
from wanforge.engines.bundle.shapes import spell
from wanforge.engines.bundle.tensorfile import TensorFile, TensorSpec
from wanforge.exporter.tracer import Tape, Traced, is_native, live_nodes, value_info
from wanforge.plugins.denoiser_block import op as denoiser_block
from wanforge.plugins.int8_convolution import onnx_function as int8_convolution
from wanforge.plugins.low_rank import is_factor
from wanforge.plugins.nvfp4_linear import onnx_function as nvfp4_linear
from wanforge.plugins.onnx_body import DOMAIN, OPSET, PLUGIN, VERSION
from wanforge.plugins.sparse_linear_attention import onnx_function as sparse_linear_attention
from wanforge.plugins.sparse_linear_attention.reference import attention_blocks
from wanforge.plugins.w8a8_linear import onnx_function as w8a8_linear
from wanforge.runtime.dtypes import STORED, element_type
from wanforge.runtime.graphs import Graph, Port
from wanforge.version import __version__

IR_VERSION = 10


def trace(graph: Graph, dtype: torch.dtype, weights: TensorFile) -> GraphProto:
    """Trace a graph in one compute type.

    Args:
        graph: The graph to trace.
        dtype: float32, float16 or bfloat16, for every port whose type is ``compute``.
        weights: The file that holds its weights. The graph takes them in their stored types and casts them where the
            compute type differs.
    """
    tape = Tape()
    inputs = [tape.input(port.name, port.shape, element_type(port.dtype, dtype)) for port in graph.inputs]
    stored = {name: weights.tensors[graph.prefix + name] for name in graph.weights if not is_factor(name)}
    factors = graph.factors
    state = {name: Traced(tape, name, spec.shape, STORED[spec.dtype]) for name, spec in stored.items()}
    state |= {name: Traced(tape, name, shape, torch.bfloat16) for name, shape in factors.items()}
    results = graph.run(state, inputs)

    outputs = []
    for port, result in zip(graph.outputs, results, strict=True):
        result = result.to(element_type(port.dtype, dtype))
        assert isinstance(result, Traced)
        assert result.shape_ == port.shape, f"{graph.name}.{port.name} is {result.shape_}, declared {port.shape}"
        outputs.append(result.name_)
    nodes = live_nodes(
        name_outputs(tape.nodes, outputs, [port.name for port in graph.outputs]), names_of(graph.outputs)
    )

    ports = [value_info(port.name, port.shape, element_type(port.dtype, dtype)) for port in graph.inputs]
    weight_infos = [weight_info(name, spec, dtype) for name, spec in stored.items()]
    weight_infos += [value_info(name, shape, torch.bfloat16) for name, shape in factors.items()]
    computed = {name for node in nodes for name in node.output}.difference(names_of(graph.outputs))
    return helper.make_graph(
        nodes,
        graph.name,
        ports if graph.has_constants else ports + weight_infos,
        [value_info(port.name, port.shape, element_type(port.dtype, dtype)) for port in graph.outputs],
        [external(name, weights, graph.prefix + name, dtype) for name in state] if graph.has_constants else [],
        value_info=[value_info(x.name_, x.shape_, x.dtype) for x in tape.declared if x.name_ in computed],
    )


def names_of(ports: Sequence[Port]) -> list[str]:
    return [port.name for port in ports]


def name_outputs(nodes: Sequence[NodeProto], found: Sequence[str], wanted: Sequence[str]) -> list[NodeProto]:
    """Give the graph's outputs the names of its ports."""
    renamed = dict(zip(found, wanted, strict=True))
    for node in nodes:
        for field in (node.input, node.output):
            field[:] = [renamed.get(name, name) for name in field]
    return list(nodes)


def weight_info(name: str, spec: TensorSpec, dtype: torch.dtype) -> ValueInfoProto:
    """The declaration of a weight as the input of a graph of this compute type."""
    return helper.make_tensor_value_info(name, *as_declared(name, spec, dtype))


def as_declared(name: str, spec: TensorSpec, dtype: torch.dtype) -> tuple[int, tuple[int, ...]]:
    """The ONNX number and the shape with which a graph of this compute type declares a weight: those with which it is
    stored, except that TensorRT's ops take 4-bit floats one by one instead of in pairs."""
    if name.endswith(".fp4_weight") and is_native(dtype):
        rows, pairs = spec.shape
        return TensorProto.FLOAT4E2M1, (rows, 2 * pairs)
    return BY_STORED[spec.dtype].onnx, spec.shape


def external(name: str, file: TensorFile, stored_name: str, dtype: torch.dtype) -> TensorProto:
    """An initializer of a graph of some compute type, whose data lies at an offset in a bundle's weights file."""
    spec = file.tensors[stored_name]
    number, shape = as_declared(stored_name, spec, dtype)
    tensor = TensorProto(name=name, data_type=number, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    place = {
        "location": f"{file.path.parent.name}/{file.path.name}",
        "offset": str(file.offsets[stored_name]),
        "length": str(spec.nbytes),
    }
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def bodies(recipe: Recipe, nodes: Sequence[NodeProto]) -> list[FunctionProto]:
    """The function bodies that these nodes call."""
    called = {node.op_type for node in nodes if node.domain == DOMAIN}
    found = []
    if w8a8_linear.NAME in called:
        found += w8a8_linear.functions(recipe.linear)
    if nvfp4_linear.NAME in called:
        found += nvfp4_linear.functions()
    if int8_convolution.NAME in called:
        found += int8_convolution.functions()
    if sparse_linear_attention.NAME in called:
        blocks = attention_blocks(recipe)
        assert blocks is not None
        found += sparse_linear_attention.functions(blocks.arithmetic)
    return found


def onnx_model(graph: GraphProto, functions: Sequence[FunctionProto]) -> ModelProto:
    """A model of one graph and the functions it calls."""
    versions = {"": OPSET} | ({DOMAIN: VERSION} if functions else {})
    versions |= dict.fromkeys(native_domains(graph.node), 1)
    versions |= {each.domain: each.version for function in functions for each in function.opset_import}
    return helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in versions.items()],
        ir_version=IR_VERSION,
        producer_name="wanforge",
        producer_version=__version__,
    )


def native_domains(nodes: Sequence[NodeProto]) -> set[str]:
    """The domains of TensorRT's own ops among these nodes."""
    return {node.domain for node in nodes if node.domain == nvfp4_linear.NATIVE_DOMAIN}


def model_from_graph(graph: Graph, recipe: Recipe, dtype: torch.dtype, weights: TensorFile) -> ModelProto:
    """The ONNX model of one graph in one compute type."""
    traced = trace(graph, dtype, weights)
    return onnx_model(traced, bodies(recipe, traced.node))


def as_function(graph: GraphProto, name: str) -> FunctionProto:
    """A traced graph as a function: the same nodes, without types on its ports."""
    versions = {"": OPSET, DOMAIN: VERSION} | dict.fromkeys(native_domains(graph.node), 1)
    opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    return helper.make_function(DOMAIN, name, inputs, outputs, list(graph.node), opsets)


def as_one_op(model: ModelProto, graph: Graph, config: DiTConfig, recipe: Recipe) -> ModelProto:
    """The model of a graph ``block`` with all its nodes in the body of one op, which TensorRT runs as one plugin."""
    name, attributes = denoiser_block.NAME, denoiser_block.attributes(config, recipe, graph.weights)
    function = as_function(model.graph, name)
    call = helper.make_node(
        name, function.input, function.output, name=f"{name}_0", domain=DOMAIN, **attributes, **PLUGIN
    )
    whole = helper.make_graph([call], denoiser_block.GRAPH, model.graph.input, model.graph.output)
    return onnx_model(whole, [function, *model.functions])


def has_one_op(graph: Graph, dtype: torch.dtype, recipe: Recipe) -> bool:
    """Whether a graph is also written as one op: a block of kernels, in the type in which TensorRT computes."""
    return graph.name == "block" and is_native(dtype) and denoiser_block.has_plugin(recipe)


def record_of(graph: Graph, dtype: torch.dtype, model: ModelProto, weights_file: str) -> GraphRecord:
    """The facts about an exported graph that the engine builder needs.

    Args:
        model: The graph with every op as a node.
        weights_file: Path in the bundle of the component's weights.
    """
    values = inferred_values(model)
    nodes = model.graph.node
    return GraphRecord(
        name=graph.name,
        dtype=dtype_called(dtype).short,
        inputs={
            **{port.name: spell(port.shape) for port in graph.inputs},
            **{name: spell(shape) for name, shape in graph.factors.items()},
        },
        plugin_ops=sum(is_plugin(node) for node in nodes),
        fp4_products=sum(port.type.tensor_type.elem_type == TensorProto.FLOAT4E2M1 for port in model.graph.input),
        attentions=sum(is_attention(node, values) for node in nodes),
        has_side_path=graph.has_side_path,
        float32_products=sum(
            node.op_type in ("MatMul", "Conv") and values[node.output[0]].elem_type == TensorProto.FLOAT
            for node in nodes
        ),
        weights=weights_file if graph.has_constants else "",
    )


def is_plugin(node: NodeProto) -> bool:
    """Whether TensorRT runs a node as a plugin of this project."""
    return any(attribute.name in PLUGIN for attribute in node.attribute)


def inferred_values(model: ModelProto) -> dict[str, TypeProto.Tensor]:
    """Type and shape of every value of a model, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value.type.tensor_type for value in [*graph.value_info, *graph.input, *graph.output]}


def is_attention(node: NodeProto, values: Mapping[str, TypeProto.Tensor]) -> bool:
    """Whether a node is an attention of several heads, or its softmax; TensorRT has fused kernels for these."""
    if node.op_type == "Attention":
        return True
    if node.op_type != "Softmax":
        return False
    dims = values[node.output[0]].shape.dim
    return len(dims) == 4 and dims[1].dim_value != 1


def check(model: ModelProto | str) -> None:
    """Check a model, or the file of one with external data, with onnx's checker and full shape inference."""
    onnx.checker.check_model(model, full_check=True)
