"""A whole block as one plugin makes the launches of the backend cuda, computes what they compute, and is the only layer
of weight in an engine."""

import ctypes
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from tests.exporter.test_graphs import seeded
from tests.launches import NotingDriver
from tests.numerics import assert_matches
from tests.onnx_runner import run_model
from tests.runtime.backends.test_fused_block import TOLERANCE
from tests.tensorrt_flavours import rtx
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.configs.topk import num_key_blocks, num_selected
from wanforge.engines.build import EngineOptions, build_engines, faults, graphs_to_build, pending_engine
from wanforge.engines.builder import Built, Layer, build
from wanforge.engines.bundle.bundle import Bundle, weights_name
from wanforge.engines.bundle.remedies import remedy
from wanforge.engines.bundle.shapes import concrete
from wanforge.engines.sizes import ShapeRange
from wanforge.errors import ConfigError, ShapeError, WanforgeError
from wanforge.exporter.export import export
from wanforge.exporter.onnx_model import as_one_op, check, model_from_graph
from wanforge.exporter.studies.skeleton import skeleton
from wanforge.plugins.denoiser_block.op import PORTS, attributes
from wanforge.plugins.denoiser_block.plugin import BlockPlugin
from wanforge.plugins.launching.call import run
from wanforge.plugins.launching.driver import Launcher, LoadedKernel
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.launching.plan import plan
from wanforge.plugins.tensor_map.tensor_map import TensorMap
from wanforge.plugins.tensorrt.plugin import Account, Attributes, Shape, plugin_class
from wanforge.runtime.backends.block_launches import empty_weights, launches, launches_of_unknown_rows
from wanforge.runtime.backends.cuda import CudaBackend
from wanforge.runtime.dtypes import element_type
from wanforge.runtime.graphs import Graph, graphs

BundleOf = Callable[[str, str], Bundle]
MODEL = "turbowan2.1-t2v-1.3b-480p"
RECIPES = ("w8a8", "w8a8-row")
CLIP = ClipShape(192, 128, 17)
Inputs = tuple[tuple[Shape, str], ...]


def block_of(model: ModelConfig, recipe: Recipe) -> tuple[BlockPlugin, Graph]:
    graph = graphs(model, recipe)["block"]
    return BlockPlugin(**attributes(model.dit, recipe, graph.weights)), graph


def inputs_of(graph: Graph, **sizes: int) -> Inputs:
    """Shapes and types of the plugin's inputs in bfloat16, as a bundle stores the weights."""
    ports = [(concrete(port.shape, sizes), element_type(port.dtype, torch.bfloat16)) for port in graph.inputs]
    weights = [(tuple(each.shape), each.dtype) for each in empty_weights(graph).values()]
    return tuple((shape, str(dtype).removeprefix("torch.")) for shape, dtype in [*ports, *weights])


def sizes_of(model: ModelConfig, recipe: Recipe, clip: ClipShape, rows: int = 512) -> dict[str, int]:
    return {"tokens": clip.tokens, "context_rows": rows, "num_selected": num_selected(recipe, clip, model.topk)}


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 89, 90, 120])
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_makes_the_launches_of_the_backend_cuda(recipe: str, sm: int) -> None:
    """In the same order, with the same grids, arguments and specialisations, at the size of the 1.3B. Nobody tells a
    plugin moments, so its first norm reads rows twice."""
    model, recipe_ = load_model(MODEL), load_recipe(recipe)
    op, graph = block_of(model, recipe_)
    made = op.plan(inputs_of(graph, **sizes_of(model, recipe_, model.video.clip)), sm)
    _, *others = known = launches(model, recipe_, sm)
    *_, first = [*known[:1], *launches_of_unknown_rows(model, recipe_, sm)]
    expected = [first, *others]
    assert (first.kernel == known[0].kernel) == (recipe == "w8a8-row")
    assert [described(planned.launch) for planned in made.launches] == [described(each) for each in expected]
    assert len(made.steps) == len(made.launches) == len(expected)


def described(launch: Launch) -> tuple[object, ...]:
    """A launch without the addresses of its tensors."""
    arguments = [(name, without_address(value)) for name, value in launch.arguments.items()]
    return launch.kernel.name, launch.grid, arguments, launch.specialisation.key


def without_address(value: object) -> object:
    if isinstance(value, TensorMap):
        return without_address(value.tensor), value.sizes, value.strides, value.box
    return (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_argument_lies_where_the_backend_cuda_has_it(bundle_of: BundleOf, recipe: str) -> None:
    """Inputs, weights and the output by name, and temporaries at the same places of the workspace."""
    bundle = bundle_of("tiny-t2v", recipe)
    op, graph = block_of(bundle.model, bundle.recipe)
    inputs = inputs_of(graph, **sizes_of(bundle.model, bundle.recipe, CLIP, 21))
    own = op.plan(inputs, 89)
    backend = CudaBackend(bundle, torch.bfloat16)
    order = [*PORTS, "hidden_out", *graph.weights]
    shapes = {**dict(zip(op.inputs, inputs, strict=True)), "hidden_out": inputs[0]}
    with torch.device("meta"):
        blanks = [torch.empty(shapes[name][0], dtype=getattr(torch, shapes[name][1])) for name in order]
    other = plan(lambda given: backend.run_block(dict(zip(order, given, strict=True))), blanks, 89)
    bases = [*op.inputs, "hidden_out", "workspace"], [*order, "workspace"]
    places = [
        [(name, names[at.base], at.offset) for step in made.launches for name, at in step.addresses.items()]
        for made, names in zip((own, other), bases, strict=True)
    ]
    assert places[0] == places[1]
    assert own.workspace_bytes == other.workspace_bytes


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_size_needs_more_than_the_workspace_of_the_largest(recipe: str) -> None:
    """The workspace is that of one plan, in which temporaries share memory, and every smaller clip fits in it."""
    model, recipe_ = load_model(MODEL), load_recipe(recipe)
    op, graph = block_of(model, recipe_)
    clip = model.video.clip
    largest = inputs_of(graph, tokens=clip.tokens, context_rows=512, num_selected=num_key_blocks(recipe_, clip))
    built = op.up_to([shape for shape, _ in largest])
    workspace = built.workspace_bytes(largest)
    assert workspace < 0.6 * built.plan(largest, 89).temporary_bytes
    for tokens, rows, selected in [(32760, 1, 1), (32760, 512, 50), (4680, 77, 8), (1000, 20, 2), (65, 1, 1)]:
        fewer = inputs_of(graph, tokens=tokens, context_rows=rows, num_selected=selected)
        for sm in (80, 89, 120):
            assert built.plan(fewer, sm).workspace_bytes <= workspace
    more = inputs_of(graph, tokens=32888, context_rows=512, num_selected=50)
    with pytest.raises(ShapeError, match="do not fit the places that were made for the largest shapes"):
        built.plan(more, 89)


class Interpreting(Launcher):
    """A launcher whose driver interprets a kernel with the parameters that it is given, at their addresses."""

    def load(self, device: torch.device, launch: Launch) -> LoadedKernel:
        return LoadedKernel(launch, launch.specialisation.types, 128, 0)


class InterpretingDriver(NotingDriver):
    """A GPU of the GeForce 40 series whose memory is the host's."""

    def current_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def sm(self, device: torch.device) -> int:
        return 89

    def launch(self, kernel: LoadedKernel, grid: tuple[int, int, int], parameters: int, stream: int) -> None:
        super().launch(kernel, grid, parameters, stream)
        told, launch = self.launches[-1], kernel.function
        assert told.grid == launch.grid
        found: dict[str, Any] = {}
        for (name, kind), value in zip(kernel.parameters, told.values, strict=True):
            like = launch.arguments[name]
            assert isinstance(value, int) or kind == "fp32"
            found[name] = at_address(int(value), like) if isinstance(like, Tensor) else value
        run(replace(launch, arguments={**launch.arguments, **found}))


def at_address(address: int, like: Tensor) -> Tensor:
    """The memory at an address as a tensor of the type, shape and strides of another."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_uint8 * (extent * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(like.dtype).as_strided(like.shape, like.stride())


def desc(tensor: Tensor) -> Any:
    """What TensorRT tells of a tensor at run time."""
    names = {torch.float32: "FLOAT", torch.int8: "INT8", torch.int32: "INT32", torch.bfloat16: "BF16"}
    return SimpleNamespace(dims=tuple(tensor.shape), type=SimpleNamespace(name=names[tensor.dtype]))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_it_enqueues_computes_the_reference(
    bundle_of: BundleOf, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's own class, with packed parameters, in a workspace for a larger clip that holds no numbers."""
    bundle, driver = bundle_of("tiny-t2v", recipe), InterpretingDriver()
    monkeypatch.setattr("wanforge.plugins.launching.driver.launcher", lambda: Interpreting(driver))
    op, graph = block_of(bundle.model, bundle.recipe)
    given, stored = seeded(graph, bundle, torch.float32, 3, tokens=200)
    weights = {name: each if each.dtype == torch.int8 else each.float() for name, each in stored.items()}
    (expected,) = graph.run(weights, list(given.values()))
    tensors = [*given.values(), *weights.values()]
    larger = [*seeded(graph, bundle, torch.float32, 3, tokens=333)[0].values(), *weights.values()]
    largest = [(tuple(each.shape), str(each.dtype).removeprefix("torch.")) for each in larger]
    plugin = plugin_class(rtx().trt, [Account()])(op.up_to([shape for shape, _ in largest])).attach_to_context(None)
    size = plugin.op.workspace_bytes(largest)
    workspace = torch.full((size + 256,), 0xA5, dtype=torch.uint8)
    start = -(-workspace.data_ptr() // 256) * 256
    out = torch.full_like(expected, float("nan"))
    described = [desc(each) for each in tensors]
    plugin.on_shape_change(described, [desc(out)])
    plugin.enqueue(described, [desc(out)], [x.data_ptr() for x in tensors], [out.data_ptr()], start, 77)
    assert_matches(out, expected, TOLERANCE[recipe])
    assert {told.stream for told in driver.launches} == {77}
    assert len(driver.launches) == len(op.plan(largest, 89).launches)
    beyond = start + size - workspace.data_ptr()
    assert bool((workspace[beyond:] == 0xA5).all())


@pytest.mark.slow
def test_onnx_runtime_runs_the_op_as_the_graph_of_single_ops(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    graph = graphs(bundle.model, bundle.recipe)["block"]
    given, weights = seeded(graph, bundle, torch.float32, 5)
    single = model_from_graph(graph, bundle.recipe, torch.float32, bundle.header(weights_name("dit")))
    whole = as_one_op(single, graph, bundle.model.dit, bundle.recipe)
    check(whole)
    shapes = {"hidden_out": given["hidden"].shape}
    found, expected = (run_model(each, given | weights, shapes) for each in (whole, single))
    assert torch.equal(found[0], expected[0])


def test_the_file_has_one_node_and_the_single_ops_in_its_body(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    ((path, record),) = bundle.graphs("bfloat16", one_op=True).items()
    whole, single = (onnx.load(str(bundle.path(each))) for each in (path, "onnx/bf16/block.onnx"))
    (call,) = whole.graph.node
    assert (call.domain, call.op_type) == ("wanforge", "Block")
    (body,) = (function for function in whole.functions if function.name == "Block")
    assert list(body.node) == list(single.graph.node)
    names = [port.name for port in graphs(bundle.model, bundle.recipe)["block"].inputs]
    assert list(call.input) == list(body.input) == [port.name for port in single.graph.input]
    assert tuple(names) == PORTS == tuple(call.input[: len(PORTS)])
    assert (record.plugin_ops, record.attentions, record.float32_products) == (1, 0, 0)
    assert record.inputs == next(each for each in bundle.graphs("bfloat16").values() if each.name == "block").inputs
    assert not bundle.graphs("float32", one_op=True)


def compiled(
    bundle: Bundle, sms: Sequence[int], clip: ClipShape, *, block_plugin: bool, smaller: bool = False
) -> Built:
    """The graph ``block`` of a bundle, compiled of single ops or as one op."""
    ((path, record),) = graphs_to_build(bundle, ["block"], block_plugin=block_plugin).items()
    pending = pending_engine(bundle, rtx(), EngineOptions(clip, tuple(sms), smaller=smaller), path, record)
    built = build(rtx(), pending.job, sms)
    assert faults(built, record) == []
    return built


def layers_of_weight(built: Built) -> list[Layer]:
    """The layers that compute or copy something, without those that tell shapes and keep streams in step."""
    return [layer for layer in built.layers if layer.kind not in ("shape_call", "signal", "wait")]


@pytest.mark.slow
@pytest.mark.parametrize("smaller", [False, True])
def test_an_engine_has_one_layer_of_weight(bundle_of: BundleOf, smaller: bool) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    whole = compiled(bundle, [89, 120], CLIP, block_plugin=True, smaller=smaller)
    (layer,) = layers_of_weight(whole)
    assert layer.is_plugin
    assert whole.plugin_nodes == 1
    ports = ("BFloat16", "Float", "BFloat16", "BFloat16", "Float", "Float", "Float", "Int32")
    assert layer.inputs[: len(PORTS)] == ports
    assert layer.outputs == ("BFloat16", "UInt8")  # the second is the workspace
    ((op, inputs),) = whole.calls
    assert isinstance(op, BlockPlugin)
    assert len(layer.inputs) == len(op.inputs) == len(inputs)
    assert json.loads(op.largest)[0] == [1, CLIP.tokens, 256]
    assert op.largest.encode() in whole.engine_bytes
    assert op.recipe.encode() in whole.engine_bytes
    assert {"w8a8_linear.gemm", "layer_norm.norm"} <= {launch.kernel.name for launch in whole.launches([89])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("cos", (100, 64), r"Block: cos \(100, 64\): must be \(480, 64\), beside hidden \(1, 480, 256\)"),
        ("selection", (9,), "Block: 9 key blocks selected of 8"),
    ],
)
def test_an_engine_for_other_shapes_is_refused(bundle_of: BundleOf, name: str, shape: Shape, said: str) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    ((path, record),) = graphs_to_build(bundle, ["block"], block_plugin=True).items()
    job = pending_engine(bundle, rtx(), EngineOptions(CLIP, (89,)), path, record).job
    with pytest.raises(WanforgeError, match=said):
        build(rtx(), replace(job, ranges={**job.ranges, name: ShapeRange(shape, shape, shape)}), [89])


@pytest.mark.slow
def test_a_bundle_gets_an_engine_with_a_block_plugin_beside_the_others(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = Bundle.open(Path(shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle")))
    options = EngineOptions(CLIP, (89, 120), ("block",), block_plugin=True)
    (single,) = build_engines(bundle, rtx(), replace(options, block_plugin=False))
    (whole,) = build_engines(bundle, rtx(), options)
    assert whole.name == "engines/sm_89+sm_120/192x128x17/block_whole.bf16.engine"
    assert (whole.plugins, single.plugins) == (1, 9)
    assert whole.faults == single.faults == []
    assert whole.activation_bytes < single.activation_bytes
    assert [engine.is_cached for engine in build_engines(bundle, rtx(), options)] == [True]
    assert remedy(whole.name, bundle.root).endswith("--resolution 192x128 --frames 17 --block-plugin")


@pytest.mark.slow
def test_a_block_that_pytorch_takes_part_in_is_refused(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "bf16")
    options = EngineOptions(CLIP, (89,), ("block",), block_plugin=True)
    with pytest.raises(ConfigError, match=r"with recipe 'bf16' cannot be one plugin\. That takes sparse attention"):
        build_engines(bundle, rtx(), options)
    op, graph = block_of(bundle.model, bundle.recipe)
    sizes = sizes_of(bundle.model, bundle.recipe, CLIP)
    with pytest.raises(ConfigError, match="need functions of PyTorch between them, which no plugin can call; build"):
        op.plan(inputs_of(graph, **sizes), 89)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("hidden", (2, -1, 256), r"hidden \(2, -1, 256\): must be one sample of tokens of 256 channels, \[1, L, 256\]"),
        ("hidden", (1, -1, 128), "must be one sample of tokens of 256 channels"),
        ("modulation", (1, 6, 128), r"modulation \(1, 6, 128\): must be \(1, 6, 256\), beside hidden"),
        ("keys", (1, 20, 256), "must be"),
        ("cos", (7, 64), r"cos \(7, 64\): must be \(-1, 64\)"),
        ("selection", (1, 2), r"selection \(1, 2\): must be a vector"),
        ("norm3.weight", (-1,), r"norm3.weight \(-1,\): only tokens, text and selected blocks may vary in number"),
    ],
)
def test_shapes_are_refused_by_name(name: str, shape: Shape, said: str) -> None:
    op, graph = block_of(load_model("tiny-t2v"), load_recipe("w8a8"))
    shapes = dict(zip(op.inputs, (each for each, _ in inputs_of(graph, **dict.fromkeys(SIZES, -1))), strict=True))
    op.check_shapes(list(shapes.values()))
    with pytest.raises(ShapeError, match=said):
        op.check_shapes(list({**shapes, name: shape}.values()))


SIZES = ("tokens", "context_rows", "num_selected")


def test_types_are_refused_by_name() -> None:
    op, graph = block_of(load_model("tiny-t2v"), load_recipe("w8a8"))
    found = [dtype for _, dtype in inputs_of(graph, tokens=5, context_rows=2, num_selected=1)]
    assert [op.refusal(at, found[: at + 1]) for at in range(len(found))] == [""] * len(found)
    at = op.inputs.index("ffn.2.int8_weight")
    wrong = [*found[:at], "bfloat16"]
    assert op.refusal(at, wrong) == "Block: ffn.2.int8_weight is bfloat16, but must be int8"
    assert op.refusal(7, [*found[:7], "int64"]) == "Block: selection is int64, but must be int32"


def test_attributes_survive_the_plan() -> None:
    op, _ = block_of(load_model("tiny-t2v"), load_recipe("w8a8"))
    kept, built = Attributes(rtx().trt, BlockPlugin), op.up_to([(1, 5, 256), (2,)])
    assert BlockPlugin(**kept.read(kept.of(built))) == built  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_block_of_the_1_3b_takes_less_memory_as_one_plugin(tmp_path: Path) -> None:
    """At its real size, for GeForce and A100: less than in single ops, and no more than the launch plan says."""
    model, recipe = load_model(MODEL), load_recipe("w8a8")
    bundle = skeleton(tmp_path / "bundle", model, recipe)
    export(bundle, ["bf16"])
    clip = model.video.clip
    whole, single = (compiled(bundle, [80, 89, 120], clip, block_plugin=each) for each in (True, False))
    assert [layer.kind for layer in layers_of_weight(whole)] == ["custom_layer"]
    ((op, inputs),) = whole.calls
    assert op.workspace_bytes(inputs) <= whole.activation_bytes <= 1.01 * op.workspace_bytes(inputs)
    assert whole.activation_bytes < 0.7 * single.activation_bytes
