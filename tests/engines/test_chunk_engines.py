"""The layer of a causal model compiles at its real size in every recipe that has engines, for every length of a chunk
and of what it sees, and each of its attentions is one kernel."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
import pytest
import torch
from onnx import ModelProto

from tests.tensorrt_flavours import rtx
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.build import EngineOptions, build_engines, faults, graphs_to_build
from wanforge.engines.builder import BuildJob, Built, build
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import GraphRecord
from wanforge.engines.bundle.tensorfile import TensorFile
from wanforge.engines.files import find_engine, inputs_of
from wanforge.engines.sizes import SizeRange, named_sizes, profile, shape_ranges
from wanforge.exporter.checkpoint.layout import layout
from wanforge.exporter.onnx_model import model_from_graph, record_of
from wanforge.runtime.graphs import graphs

GEFORCE_AND_A100 = (80, 86, 89, 120)
BLACKWELL = (120, 121)
SMALL = load_model("causal-rcm-wan2.1-t2v-1.3b-480p-c1-step2")
THREES = load_model("causal-rcm-wan2.1-t2v-1.3b-480p-c3-step4")
# No model of this size with few steps is published, so this one has only the shapes.
LARGE = msgspec.structs.replace(THREES, dit=msgspec.structs.replace(THREES.dit, dim=5120, ffn_dim=13824))
MODELS = {"1.3b": SMALL, "14b": LARGE}


@dataclass(frozen=True)
class Compiled:
    """The layer of a model as a graph and as an engine."""

    model: ModelConfig
    onnx: ModelProto
    graph: GraphRecord
    built: Built


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Compiled]:
    """Compiles the layer of one of `MODELS` in a recipe, once."""
    library = rtx()

    @cache
    def made(name: str, recipe_name: str) -> Compiled:
        model = MODELS[name]
        recipe = model.fitted(load_recipe(recipe_name))
        graph = graphs(model, recipe)["chunk_block"]
        weights = TensorFile(Path("weights/dit.safetensors"), layout("dit", model, recipe), {}, {})
        onnx = model_from_graph(graph, recipe, torch.bfloat16, weights)
        path = tmp_path_factory.mktemp("graph") / "chunk_block.onnx"
        path.write_bytes(onnx.SerializeToString())
        record = record_of(graph, torch.bfloat16, onnx, "")
        ranges = shape_ranges(inputs_of(record), named_sizes(model, recipe, model.video.clip))
        sms = BLACKWELL if recipe_name == "nvfp4" else GEFORCE_AND_A100
        return Compiled(model, onnx, record, build(library, BuildJob(path, ranges), sms))

    return made


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "w8a8", "w8a8-row", "nvfp4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_fused_in_every_recipe(name: str, recipe: str, compiled: Callable[[str, str], Compiled]) -> None:
    found = compiled(name, recipe)
    layers = found.built.layers
    assert faults(found.built, found.graph) == []
    # Self-attention to what is seen, and attention to the text.
    assert [layer.inputs for layer in layers if layer.is_attention] == [("BFloat16",) * 4] * 2
    linears = 8
    plugins = [layer.inputs for layer in layers if layer.is_plugin]
    assert plugins == ([("BFloat16", "Int8", "Float", "BFloat16")] * linears if recipe.startswith("w8a8") else [])
    assert sum(layer.is_fp4_product for layer in layers) == (linears if recipe == "nvfp4" else 0)
    if recipe == "bf16":
        products = [layer for layer in layers if layer.is_product and not layer.is_attention]
        assert len(products) == linears
        assert {dtype for layer in products for dtype in layer.inputs} == {"BFloat16"}
    assert len(found.built.engine_bytes) < 6e6


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_masks_take_no_memory(name: str, compiled: Callable[[str, str], Compiled]) -> None:
    """Keys and values are copied next to those of earlier chunks, and that takes most of the memory of an engine. A
    mask with a row per query would take 102 MB with 1,560 queries."""
    found = compiled(name, "w8a8")
    assert "Expand" not in {node.op_type for node in found.onnx.graph.node}
    sizes = named_sizes(found.model, found.model.fitted(load_recipe("w8a8")), found.model.video.clip)
    copies = 2 * 2 * sizes["seen_tokens"].most * found.model.dit.dim
    rows = 2 * sizes["tokens"].most * found.model.dit.dim
    assert found.built.activation_bytes < copies + 9 * rows


@pytest.mark.slow
def test_engines_are_built_from_the_files_of_a_bundle(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> None:
    library = rtx()
    bundle = Bundle.open(Path(shutil.copytree(bundle_of("tiny-causal", "w8a8").root, tmp_path / "bundle")))
    only = ("chunk_block", "chunk_block_lora")
    options = EngineOptions(bundle.model.video.clip, (89, 120), only, smaller=True, side_rank=16)
    engines = build_engines(bundle, library, options)
    assert [(engine.plugins, engine.faults) for engine in engines] == [(8, [])] * 2
    assert [engine.name.removeprefix("engines/sm_89+sm_120/up-to-192x128x17/") for engine in engines] == [
        "chunk_block.bf16.engine",
        "chunk_block_lora16.bf16.engine",
    ]
    (onnx,) = graphs_to_build(bundle, ["chunk_block"])
    record = bundle.manifest.files[onnx].graph
    assert record is not None

    def found(clip: ClipShape) -> str:
        sizes = named_sizes(bundle.model, bundle.recipe, clip)
        return find_engine(bundle, onnx, 89, profile(inputs_of(record), sizes), clip)

    assert found(ClipShape(192, 128, 9)) == found(ClipShape(96, 64, 17)) == engines[0].name


def test_an_engine_is_for_every_chunk_of_a_size() -> None:
    found = {name: str(size) for name, size in sizes_of(THREES, ClipShape(832, 480, 81)).items()}
    area = 30 * 52
    assert found == {
        "tokens": f"{area}..{3 * area}",  # an image is a chunk of one latent frame
        "past_tokens": f"{area}..{18 * area}",
        "seen_tokens": f"{2 * area}..{21 * area}",
        "latent_height": "60",
        "latent_width": "104",
        "prompt_tokens": "1..512",
        "context_rows": "1..512",
        "num_selected": "1",
    }
    assert str(sizes_of(SMALL, ClipShape(832, 480, 81))["tokens"]) == str(area)
    smaller = sizes_of(THREES, ClipShape(832, 480, 81), smaller=True)
    assert str(smaller["seen_tokens"]) == f"2..{21 * area}"


def sizes_of(model: ModelConfig, clip: ClipShape, *, smaller: bool = False) -> dict[str, SizeRange]:
    return named_sizes(model, model.fitted(load_recipe("w8a8")), clip, smaller=smaller)
