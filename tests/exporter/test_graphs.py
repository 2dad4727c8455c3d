"""Every exported graph in ONNX Runtime is compared with the piece of the reference that it was traced from."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from tests.forcing import forced, run_with_decisions
from tests.numerics import assert_matches, relative_rms
from tests.onnx_runner import run_model
from wanforge.configs.topk import num_selected_of
from wanforge.engines.bundle.bundle import Bundle, graph_name
from wanforge.engines.bundle.shapes import concrete
from wanforge.exporter.tracer import live_nodes
from wanforge.runtime.graphs import Graph, Port, graphs
from wanforge.runtime.memory.weights import Weights
from wanforge.runtime.reference.dit import DiT, patchify, rope_tables, sinusoid, unpatchify

CASES = [
    ("tiny-t2v", "w8a8"),
    pytest.param("tiny-t2v", "bf16", marks=pytest.mark.slow),
    pytest.param("tiny-i2v", "bf16-sla", marks=pytest.mark.slow),
]
SIZES = {
    "tokens": 333,
    "past_tokens": 40,
    "seen_tokens": 373,
    "context_rows": 21,
    "num_selected": 2,
    "prompt_tokens": 19,
    "latent_height": 5,
    "latent_width": 7,
}
GRAPHS = [
    *("text_embed", "text_block", "text_final", "context", "cross_kv", "time", "stem", "block", "head"),
    *("vae_decode_first", "vae_decode_next", "vae_encode_first", "vae_encode_next"),
]
# In float32 only the order of sums differs.
TOLERANCE = 1e-5
# float16 carries 11 bits, and the reference rounds where ONNX Runtime keeps float32; in 8-bit blocks, values on the
# edge between two quantisation steps fall to different sides.
HALF_TOLERANCE = {"w8a8": 2e-2, "bf16": 5e-3, "bf16-sla": 5e-3}

BundleOf = Callable[[str, str], Bundle]


def example(port: Port, dtype: torch.dtype, generator: torch.Generator, sizes: Mapping[str, int] = SIZES) -> Tensor:
    """Plausible values for an input of any graph."""
    shape = concrete(port.shape, sizes)
    if port.name in ("ids", "buckets"):
        return torch.randint(0, 32, shape, generator=generator)
    if port.name == "kept_rows":
        return torch.randperm(512, generator=generator)[: shape[0]]
    if port.name == "selection":
        return torch.zeros(shape, dtype=torch.int32)
    value = torch.randn(shape, generator=generator)
    if port.name == "seen_bias":
        value[sizes["past_tokens"] // 2 : sizes["past_tokens"]] = -torch.inf
    if port.dtype == "int8":
        return (32 * value).clamp(-127, 127).to(torch.int8)
    return value if port.dtype == "float32" else value.to(dtype)


def weights_for(graph: Graph, bundle: Bundle) -> tuple[dict[str, Tensor], str]:
    component = graph.component(bundle.model)
    stored = Weights(bundle).component(component)
    return {name: stored[graph.prefix + name] for name in graph.weights}, component


def seeded(
    graph: Graph, bundle: Bundle, dtype: torch.dtype, seed: int, tokens: int = SIZES["tokens"]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random inputs and the bundle's weights of a graph."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {**SIZES, "tokens": tokens, "seen_tokens": SIZES["past_tokens"] + tokens}
    inputs = {port.name: example(port, dtype, generator, sizes) for port in graph.inputs}
    return inputs, weights_for(graph, bundle)[0]


def run_both(bundle: Bundle, name: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Graph]:
    graph = graphs(bundle.model, bundle.recipe)[name]
    feeds, weights = seeded(graph, bundle, dtype, len(name))
    with torch.inference_mode():
        expected = graph.run(weights, list(feeds.values()))
    path = bundle.path(graph_name(name, dtype, graph.has_constants))
    shapes = {port.name: concrete(port.shape, SIZES) for port in graph.outputs}
    actual = run_model(str(path), feeds if graph.has_constants else feeds | weights, shapes)
    return actual, [e.to(a.dtype) for a, e in zip(actual, expected, strict=True)], graph


@pytest.mark.parametrize(("model", "recipe"), CASES)
@pytest.mark.parametrize("name", GRAPHS)
def test_matches_the_reference(bundle_of: BundleOf, model: str, recipe: str, name: str) -> None:
    if (name, recipe) == ("block", "w8a8"):
        pytest.skip("compared below, with the same rounding decisions in both")
    if name.startswith("vae_encode") and model == "tiny-t2v":
        pytest.skip("text-to-video models have no encoder graphs")
    actual, expected, graph = run_both(bundle_of(model, recipe), name, torch.float32)
    for port, a, e in zip(graph.outputs, actual, expected, strict=True):
        assert_matches(a, e, TOLERANCE, name=f"{name}.{port.name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae_decode_first", "vae_decode_next"])
def test_a_decoder_in_int8_matches_but_for_a_few_steps(bundle_of: BundleOf, name: str) -> None:
    """The last bits of a norm decide now and then whether a value is rounded to one step or to the next, and then
    whether those that depend on it are. The error of rounding them all otherwise is about 2e-2."""
    actual, expected, graph = run_both(bundle_of("tiny-t2v", "w8a8-vae8"), name, torch.float32)
    assert {port.dtype for port in graph.outputs} == {"compute", "int8"}
    for port, a, e in zip(graph.outputs, actual, expected, strict=True):
        if port.dtype == "int8":
            assert ((a.int() - e.int()).abs() > 0).float().mean() < 2e-2, port.name
        else:
            assert relative_rms(a, e) < 1e-2, port.name


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [333, 480])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("model", "name", "recipe"),
    [
        ("tiny-t2v", "block", "w8a8"),
        ("tiny-t2v", "cross_kv", "w8a8"),
        ("tiny-i2v", "block", "w8a8"),
        ("tiny-t2v", "block", "w8a8-row"),
        ("tiny-t2v", "cross_kv", "w8a8-row"),
        ("tiny-t2v", "block", "fp8-row"),
        ("tiny-t2v", "cross_kv", "fp8-row"),
        ("tiny-causal", "chunk_block", "w8a8"),
        ("tiny-causal", "chunk_block", "w8a8-row"),
        ("tiny-causal", "chunk_block", "fp8-row"),
    ],
)
def test_matches_the_reference_where_both_round_alike(
    bundle_of: BundleOf, model: str, name: str, recipe: str, seed: int, tokens: int
) -> None:
    """With the same rounding decisions, 8-bit linears match as closely as others, and few decisions differ."""
    bundle = bundle_of(model, recipe)
    graph = graphs(bundle.model, bundle.recipe)[name]
    inputs, weights = seeded(graph, bundle, torch.float32, seed, tokens)
    path = bundle.path(graph_name(name, torch.float32, False))
    found, decisions = run_with_decisions(path, inputs | weights)
    with torch.inference_mode(), forced(decisions):
        expected = graph.run(weights, list(inputs.values()))
    for port, e in zip(graph.outputs, expected, strict=True):
        assert_matches(found[port.name], e, TOLERANCE, name=f"{name}.{port.name}")
    assert decisions.all_taken
    assert len(decisions.linear) == {"block": 8, "chunk_block": 8, "cross_kv": 2}[name]
    assert decisions.furthest <= 1
    assert decisions.differing < 1e-4 * decisions.total
    assert decisions.other_blocks == 0


@pytest.mark.slow
@pytest.mark.parametrize(("model", "recipe"), CASES[:2])
@pytest.mark.parametrize("name", GRAPHS[:11])
def test_matches_the_reference_in_float16(bundle_of: BundleOf, model: str, recipe: str, name: str) -> None:
    actual, expected, graph = run_both(bundle_of(model, recipe), name, torch.float16)
    for port, a, e in zip(graph.outputs, actual, expected, strict=True):
        assert_matches(a, e, HALF_TOLERANCE[recipe], name=f"{name}.{port.name}")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.float16, HALF_TOLERANCE["bf16"])])
def test_a_chunk_matches_the_reference(bundle_of: BundleOf, dtype: torch.dtype, tolerance: float) -> None:
    actual, expected, graph = run_both(bundle_of("tiny-causal", "bf16"), "chunk_block", dtype)
    for port, a, e in zip(graph.outputs, actual, expected, strict=True):
        assert_matches(a, e, tolerance, name=port.name)


def test_masks_are_expanded_for_onnx_runtime_alone(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-causal", "bf16")
    masks = {}
    for dtype in ("float32", "bfloat16"):
        nodes = onnx.load(str(bundle.path(graph_name("chunk_block", dtype, False)))).graph.node
        makers = {output: node.op_type for node in nodes for output in node.output}
        masks[dtype] = [makers[node.input[3]] == "Expand" for node in nodes if node.op_type == "Attention"]
    assert masks == {"float32": [True, True], "bfloat16": [False, False]}


def steps_of(model: onnx.ModelProto) -> list[str]:
    """The ops of a graph, except for casts, constants, and what expands masks, which only ONNX Runtime needs."""
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "Attention" and node.input[3:] and (mask := makers[node.input[3]]).op_type == "Expand":
            node.input[3] = mask.input[0]
    live = live_nodes(model.graph.node, [output.name for output in model.graph.output])
    return [node.op_type for node in live if node.op_type not in ("Cast", "Constant")]


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_bfloat16_is_the_float16_graph_with_another_type(bundle_of: BundleOf, model: str, recipe: str) -> None:
    bundle = bundle_of(model, recipe)
    half, brain = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
    for graph in graphs(bundle.model, bundle.recipe).values():
        models = [
            onnx.load(str(bundle.path(graph_name(graph.name, t, graph.has_constants))), load_external_data=False)
            for t in ("float16", "bfloat16")
        ]
        # Values stored in bfloat16 need no cast in the bfloat16 graph; all else is the same, node for node.
        steps = [steps_of(each) for each in models]
        assert steps[0] == steps[1], graph.name
        for found, dtype in zip(models, (half, brain), strict=True):
            ports = {p.name for p in (*graph.inputs, *graph.outputs) if p.dtype == "compute"}
            infos = [*found.graph.input, *found.graph.output]
            types = {i.name: i.type.tensor_type.elem_type for i in infos if i.name in ports}
            assert ports or graph.name == "time"  # the time graph is float32 throughout
            assert types == dict.fromkeys(ports, dtype), graph.name


def check(bundle: Bundle, files: Iterable[str], folder: Path) -> None:
    """Let the checker read some files in a copy of their bundle. It takes no files with a second name, which other
    tests give those of a bundle."""
    copied = shutil.copytree(bundle.root, folder / "bundle")
    for name in files:
        onnx.checker.check_model(str(copied / name), full_check=True)


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_every_graph_passes_the_checker(bundle_of: BundleOf, model: str, recipe: str, tmp_path: Path) -> None:
    bundle = bundle_of(model, recipe)
    files = [name for name in bundle.manifest.files if name.endswith(".onnx")]
    # Thirteen graphs (eleven without the VAE's encoder) and one whole network per expert, in three types; two of them
    # also with a side path, where linears are quantised, and a block as one op for TensorRT.
    is_quantised = bundle.recipe.linear != "bf16"
    assert len(files) == 3 * ((14 + 1 if model == "tiny-i2v" else 11 + 1) + 2 * is_quantised) + is_quantised
    check(bundle, files, tmp_path)


def test_custom_ops_are_nodes_with_bodies(bundle_of: BundleOf) -> None:
    model = onnx.load(str(bundle_of("tiny-t2v", "w8a8").path("onnx/bf16/block.onnx")))
    ours = [node for node in model.graph.node if node.domain == "wanforge"]
    assert sorted(node.op_type for node in ours) == ["SparseLinearAttention", *["W8A8Linear"] * 8]
    for node in ours:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"wanforge"
        assert attributes["plugin_version"] == b"1"
    assert {"W8A8Linear", "SparseLinearAttention"} <= {function.name for function in model.functions}
    assert not any(tensor.name for tensor in model.graph.initializer)
    assert max(len(node.attribute) and len(node.SerializeToString()) for node in model.graph.node) < 2000


@pytest.mark.slow
@pytest.mark.parametrize(("model", "recipe"), [("tiny-t2v", "w8a8"), ("tiny-t2v", "bf16"), ("tiny-i2v", "bf16-sla")])
@torch.inference_mode()
def test_the_whole_network_in_one_file_matches_the_reference(bundle_of: BundleOf, model: str, recipe: str) -> None:
    bundle = bundle_of(model, recipe)
    config, expert = bundle.model, bundle.model.experts[-1]
    component = f"dit.{expert}" if expert else "dit"
    inputs, latents, text, timestep, grid = whole_inputs(bundle)
    shape = {"velocity": (1, len(inputs["cos"]), 64)}
    velocity = run_model(str(bundle.path(f"{component}.fp32.onnx")), inputs, shape)[0]

    with torch.device("meta"):
        dit = DiT(config.dit, bundle.recipe)
    dit.load_state_dict(Weights(bundle).component(component), assign=True)
    expected = dit(latents, timestep, text, num_selected=len(inputs["selection"]))
    # Over all the 8-bit layers of the network, different rounding decisions add up from layer to layer.
    assert relative_rms(unpatchify(velocity, grid), expected) < {"w8a8": 2e-2}.get(recipe, 1e-5)


def whole_inputs(bundle: Bundle) -> tuple[Mapping[str, Tensor], Tensor, Tensor, Tensor, tuple[int, int, int]]:
    """The inputs of the whole network, with all text rows kept, and the corresponding inputs of the reference."""
    config, grid = bundle.model, (3, 6, 11)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.dit.in_channels, 3, 12, 22, generator=generator)
    text = torch.randn(1, 512, config.dit.text_dim, generator=generator)
    timestep = torch.tensor([932.0])
    cos, sin = rope_tables(grid)
    selected = num_selected_of(config.topk, -(-len(cos) // 64)) if bundle.recipe.attention != "dense" else 1
    inputs = {
        "patches": patchify(latents),
        "sinusoid": sinusoid(timestep, 256),
        "text": text,
        "kept_rows": torch.arange(512),
        "key_bias": torch.zeros(512),
        "cos": cos,
        "sin": sin,
        "selection": torch.zeros(selected, dtype=torch.int32),
    }
    return inputs, latents, text, timestep, grid


def test_weights_lie_in_the_bundle_and_nowhere_else(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    model = onnx.load(str(bundle.path("dit.bf16.onnx")), load_external_data=False)
    stored = Weights(bundle).component("dit")
    assert {tensor.name for tensor in model.graph.initializer} == set(stored)
    data = (bundle.root / "weights/dit.safetensors").read_bytes()
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "weights/dit.safetensors"
        start, length = int(place["offset"]), int(place["length"])
        assert data[start : start + length] == stored[tensor.name].contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.slow
def test_polygraphy_opens_the_whole_network(bundle_of: BundleOf) -> None:
    from polygraphy.backend.onnx import onnx_from_path
    from polygraphy.backend.onnx.util import str_from_onnx

    model = onnx_from_path(str(bundle_of("tiny-t2v", "w8a8").path("dit.fp32.onnx")))
    assert "SparseLinearAttention" in {f.name for f in model.functions}
    assert "velocity" in str_from_onnx(model)


@pytest.mark.parametrize("recipe", ["fp8-row", "nvfp4"])
def test_keys_and_values_in_few_bits_match_the_reference(bundle_of: BundleOf, recipe: str) -> None:
    """Both sides get the same inputs, so all of them are rounded alike."""
    actual, expected, graph = run_both(bundle_of("tiny-t2v", recipe), "cross_kv", torch.float32)
    for port, a, e in zip(graph.outputs, actual, expected, strict=True):
        assert_matches(a, e, TOLERANCE, name=port.name)


def test_4_bit_linears_are_nodes_for_onnx_runtime_and_native_ops_for_tensorrt(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "nvfp4")
    models = {t: onnx.load(str(bundle.path(f"onnx/{t}/block.onnx"))) for t in ("fp32", "bf16")}
    ours = {t: [node.op_type for node in model.graph.node if node.domain] for t, model in models.items()}
    assert sorted(ours["fp32"]) == [*["NVFP4Linear"] * 8, "SparseLinearAttention"]
    # Queries, keys and values have the same input, which is quantised once.
    assert sorted(ours["bf16"]) == ["SparseLinearAttention", *["TRT_FP4DynamicQuantize"] * 6]
    inputs = {t: {i.name: i.type.tensor_type for i in model.graph.input} for t, model in models.items()}
    weight = {t: found["ffn.0.fp4_weight"] for t, found in inputs.items()}
    shapes = {t: [d.dim_value for d in found.shape.dim] for t, found in weight.items()}
    assert shapes == {"fp32": [512, 128], "bf16": [512, 256]}
    assert (weight["fp32"].elem_type, weight["bf16"].elem_type) == (onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT4E2M1)
    records = {
        record.dtype: record
        for record in (*bundle.graphs("float32").values(), *bundle.graphs("bfloat16").values())
        if record.name == "block"
    }
    assert {t: (each.plugin_ops, each.fp4_products) for t, each in records.items()} == {"fp32": (1, 0), "bf16": (1, 8)}


def test_linears_in_8_bit_floats_are_nodes_without_a_plugin(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of("tiny-t2v", "fp8-row")
    model = onnx.load(str(bundle.path("onnx/fp32/block.onnx")))
    assert sorted(node.op_type for node in model.graph.node if node.domain) == [
        "SparseLinearAttention",
        *["W8A8Linear"] * 8,
    ]
    inputs = {port.name: port.type.tensor_type.elem_type for port in model.graph.input}
    assert inputs["ffn.0.fp8_weight"] == onnx.TensorProto.FLOAT8E4M3FN
    (record,) = (record for record in bundle.graphs("float32").values() if record.name == "block")
    assert record.plugin_ops == 1  # attention
    check(bundle, [name for name in bundle.manifest.files if name.endswith(".onnx") and "vae" not in name], tmp_path)


def test_every_4_bit_graph_passes_the_checker(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of("tiny-t2v", "nvfp4")
    check(bundle, [name for name in bundle.manifest.files if name.endswith(".onnx") and "vae" not in name], tmp_path)
