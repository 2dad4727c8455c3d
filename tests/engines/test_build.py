"""Every graph of a tiny model compiles for several architectures, and is fused as it should be; faults are found."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from tests.tensorrt_flavours import rtx
from wanforge.cli import cli
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import parse_targets
from wanforge.engines import build as build_module
from wanforge.engines.build import EngineOptions, build_engines, faults, graphs_to_build, pending_engine
from wanforge.engines.builder import BuildJob, Built, build
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import HOST_GRAPHS, GraphRecord, read_manifest, write_manifest
from wanforge.engines.files import built_clips, find_engine, inputs_of, read_engine
from wanforge.engines.sizes import covers, named_sizes, profile
from wanforge.errors import BundleError, ConfigError, ResourceError, WanforgeError
from wanforge.plugins.launching import compiler
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.tensorrt.library import group_by_flavour
from wanforge.runtime.commands.build import check_bf16
from wanforge.runtime.graphs import graphs

CLIP = ClipShape(192, 128, 17)


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> Bundle:
    rtx()
    shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def built(bundle: Bundle, graph: str, *, plugins: bool = True, dtype: str = "bfloat16") -> Built:
    """One graph of a bundle, compiled for sm_89."""
    ((onnx, record),) = graphs_to_build(bundle, [graph]).items()
    pending = pending_engine(bundle, rtx(), EngineOptions(CLIP, (89,), plugins=plugins), onnx, record)
    (path,) = (name for name, each in bundle.graphs(dtype).items() if each.name == graph)
    return build(rtx(), replace(pending.job, onnx=bundle.root / path), [89], plugins=plugins)


def record_of(bundle: Bundle, graph: str) -> GraphRecord:
    """The manifest's record of a graph from which engines are built."""
    (record,) = graphs_to_build(bundle, [graph]).values()
    return record


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "recipe", "sms"),
    [
        ("tiny-t2v", "w8a8", (89, 120)),
        ("tiny-i2v", "w8a8", (80, 86)),
        ("tiny-t2v", "bf16", (120,)),
        ("tiny-rcm", "bf16", (89, 120)),
        ("tiny-rcm", "w8a8", (89,)),
        ("tiny-lightx2v", "bf16", (86,)),
    ],
)
def test_every_graph_compiles_and_is_fused(
    model: str, recipe: str, sms: tuple[int, ...], bundle_of: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    library = rtx()
    shutil.copytree(bundle_of(model, recipe).root, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    engines = build_engines(bundle, library, EngineOptions(CLIP, sms))
    on_the_gpu = [name for name in graphs(bundle.model, bundle.recipe) if name not in HOST_GRAPHS]
    assert [engine.graph for engine in engines] == on_the_gpu
    assert [engine.faults for engine in engines] == [[] for _ in engines]
    plugins = {engine.graph: engine.plugins for engine in engines if engine.plugins}
    in_block = 9 if bundle.model.dit.sparse else 8  # eight linears, and sparse attention
    assert plugins == ({"block": in_block, "cross_kv": 2} if recipe == "w8a8" else {})
    for engine in engines:
        assert len(read_engine(bundle, engine.name)) == engine.bytes
    again = build_engines(bundle, library, EngineOptions(CLIP, sms))
    assert all(engine.is_cached for engine in again)


@pytest.mark.slow
def test_one_engine_serves_every_smaller_clip(bundle: Bundle) -> None:
    small, large = ClipShape(96, 64, 9), ClipShape(208, 128, 17)
    (engine,) = build_engines(bundle, rtx(), EngineOptions(CLIP, (89,), only=("block",), smaller=True))
    assert engine.name == "engines/sm_89/up-to-192x128x17/block.bf16.engine"
    assert engine.faults == []
    ((onnx, record),) = graphs_to_build(bundle, ["block"]).items()

    def found(clip: ClipShape) -> str:
        sizes = named_sizes(bundle.model, bundle.recipe, clip)
        return find_engine(bundle, onnx, 89, profile(inputs_of(record), sizes), clip)

    assert found(small) == found(CLIP) == engine.name
    with pytest.raises(
        BundleError, match=r"no engine of onnx/bf16/block\.onnx for sm_89 and .*tokens=520; there is sm_89"
    ) as caught:
        found(large)
    assert str(caught.value).endswith("--target sm_89 --resolution 208x128 --frames 17")
    (exact,) = build_engines(bundle, rtx(), EngineOptions(small, (89,), only=("block",)))
    assert (found(small), found(CLIP)) == (exact.name, engine.name)
    assert built_clips(bundle) == [small, CLIP]


@pytest.mark.parametrize(
    ("wanted", "is_covered"),
    [
        ("rows=1..512 tokens=480", True),
        ("rows=1..512 tokens=1..480", True),
        ("rows=1..512 tokens=481", False),
        ("rows=1..513 tokens=480", False),
        ("tokens=480", False),
        ("rows=1..512 steps=1 tokens=480", False),
    ],
)
def test_a_profile_covers_what_lies_in_it(wanted: str, is_covered: bool) -> None:
    assert covers("rows=1..512 tokens=1..480", wanted) == is_covered


@pytest.mark.slow
def test_the_unregistered_plugin_is_caught(bundle: Bundle) -> None:
    found = faults(built(bundle, "cross_kv", plugins=False), record_of(bundle, "cross_kv"))
    assert found[0] == "2 ops should be plugins; 0 were taken and 0 compiled"
    assert "products in float32" in found[1]
    assert faults(built(bundle, "cross_kv", plugins=False), record_of(bundle, "cross_kv"), plugins=False) == []


def test_a_leak_of_float32_is_caught(bundle: Bundle) -> None:
    (fault,) = faults(built(bundle, "stem", dtype="float32"), record_of(bundle, "stem"))
    assert "1 products in float32" in fault
    assert faults(built(bundle, "stem"), record_of(bundle, "stem")) == []


def test_attention_that_is_not_fused_is_caught(bundle: Bundle) -> None:
    one, record = built(bundle, "text_block"), record_of(bundle, "text_block")
    assert faults(one, record) == []
    without = tuple(layer for layer in one.layers if not layer.is_attention)
    assert faults(replace(one, layers=without), record) == ["0 of 1 attentions are fused"]


@pytest.fixture
def fp4_bundle(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> Bundle:
    rtx()
    return Bundle.open(Path(shutil.copytree(bundle_of("tiny-t2v", "nvfp4").root, tmp_path / "fp4")))


@pytest.mark.slow
@pytest.mark.parametrize("smaller", [False, True])
def test_every_4_bit_linear_becomes_a_product_of_4_bit_floats(fp4_bundle: Bundle, smaller: bool) -> None:
    options = EngineOptions(CLIP, (120, 121), only=("block", "cross_kv"), smaller=smaller)
    engines = build_engines(fp4_bundle, rtx(), options)
    assert {engine.graph: engine.faults for engine in engines} == {"cross_kv": [], "block": []}
    assert {engine.graph: engine.plugins for engine in engines} == {"cross_kv": 0, "block": 1}


@pytest.mark.slow
def test_a_4_bit_linear_that_is_multiplied_otherwise_is_caught(fp4_bundle: Bundle) -> None:
    ((onnx, record),) = graphs_to_build(fp4_bundle, ["cross_kv"]).items()
    job = pending_engine(fp4_bundle, rtx(), EngineOptions(CLIP, (120,)), onnx, record).job
    one = build(rtx(), job, [120])
    assert faults(one, record) == []
    without = tuple(
        replace(layer, inputs=("Float", "BFloat16")) if layer.is_fp4_product else layer for layer in one.layers
    )
    assert faults(replace(one, layers=without), record) == ["0 of 2 linears are products of 4-bit floats"]


def test_8_bit_floats_are_refused(bundle_of: Callable[[str, str], Bundle]) -> None:
    with pytest.raises(ConfigError, match=r"8-bit floats of recipe 'fp8-row' in bfloat16.* --backend cuda"):
        build_engines(bundle_of("tiny-t2v", "fp8-row"), rtx(), EngineOptions(CLIP, (120,)))


def test_architectures_without_4_bit_floats_are_refused(fp4_bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"sm_89 cannot multiply nvfp4, .* sm_100 is the first .* --recipe w8a8"):
        build_engines(fp4_bundle, rtx(), EngineOptions(CLIP, (89, 120)))


def test_sizes_are_the_clips_and_ranges_of_requests() -> None:
    model, recipe = load_model("tiny-t2v"), load_recipe("w8a8")
    found = {name: str(size) for name, size in named_sizes(model, recipe, CLIP).items()}
    assert found == {
        "tokens": "480",
        "latent_height": "16",
        "latent_width": "24",
        "prompt_tokens": "1..512",
        "context_rows": "1..512",
        "num_selected": "1..8",
    }


def test_too_little_memory_is_said_before_the_start(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "available_bytes", lambda: 1e8)
    with pytest.raises(ResourceError, match=r"building stem takes about 0\.5 GB of memory, and 0\.1 GB are free"):
        build_engines(bundle, rtx(), EngineOptions(CLIP, (120,), only=("stem",)))
    assert not (bundle.root / "engines").exists()


@pytest.mark.slow
def test_the_kernels_of_plugins_are_compiled_on_demand(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Launch] = []
    monkeypatch.setattr(compiler, "compile_kernels", lambda launches, folder, progress: asked.extend(launches))
    arguments = ("build", bundle.root, "--target", "rtx3090,rtx4090", "--graph", "block", "--graph", "stem")
    code, said = run(*arguments, "--kernels")
    assert code == 0
    specialisations = {launch.specialisation for launch in asked}
    assert f"9 plugins, {len(specialisations)} kernels" in said
    assert {one.sm for one in specialisations} == {86, 89}
    attention = {one.sm: one.kernel for one in specialisations if one.kernel.endswith(".attention")}
    assert attention == {86: "sparse_linear_attention.attention", 89: "warp_attention.attention"}
    asked.clear()
    assert run(*arguments)[1].count("up to date") == 2 + 1
    assert not asked
    assert "1 built, 1 up to date" in run(*arguments, "--kernels")[1]
    assert asked


@pytest.mark.slow
def test_an_interrupted_build_keeps_what_is_done(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(engine: object) -> None:
        raise KeyboardInterrupt

    options = EngineOptions(CLIP, (120,), only=("stem", "head"))
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, rtx(), options, done=interrupt)
    again = build_engines(Bundle.open(bundle.root), rtx(), options)
    assert [engine.is_cached for engine in again] == [True, False]


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return 1, done.output + str(done.exception)
    return done.return_value or 0, done.output


@pytest.mark.slow
def test_the_command_builds_and_inspect_tells_what_is_wrong(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = run("build", bundle.root, "--target", "rtx5090,rtx4090", "--graph", "stem", "--json")
    report = json.loads(said)
    assert (code, report["failures"]) == (0, [])
    (engine,) = report["engines"]
    assert engine["name"] == "engines/sm_89+sm_120/192x128x17/stem.bf16.engine"
    assert engine["faults"] == []
    assert run("inspect", bundle.root)[0] == 0

    path = bundle.root / engine["name"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, said = run("inspect", bundle.root, "--verify")
    assert code == 1
    assert "damaged" in said
    with pytest.raises(BundleError, match="damaged, or not built here"):
        read_engine(Bundle.open(bundle.root), engine["name"])
    assert "1 built" in run("build", bundle.root, "--target", "rtx5090,rtx4090", "--graph", "stem")[1]

    monkeypatch.setattr("wanforge.engines.files.installed_version", lambda flavour: "9.9")
    code, said = run("inspect", bundle.root)
    assert code == 1
    assert "tensorrt-rtx 9.9 is installed; build it again with: wanforge build" in said


def test_hopper_is_refused_and_the_rest_is_built(bundle: Bundle) -> None:
    code, said = run("build", bundle.root, "--target", "h100,rtx3090", "--graph", "stem", "--plan")
    assert code == 1
    assert "no memory plan for rtx3090" in said
    assert "h100" not in said  # a plan without engines would tell what the build has just refused
    assert "1 built" in said
    assert "sm_90: " in said
    assert "tensorrt" in said.lower()
    assert (bundle.root / "engines" / "sm_86").is_dir()
    assert not (bundle.root / "engines" / "sm_90").exists()


def test_an_unknown_graph_is_refused(bundle: Bundle) -> None:
    assert (
        "no graph is called 'bolck'; known: text_block"
        in run("build", bundle.root, "--target", "rtx5090", "--graph", "bolck")[1]
    )


def test_a_graph_that_runs_on_the_host_has_no_engine(bundle: Bundle) -> None:
    assert "text_embed" not in {graph.name for graph in graphs_to_build(bundle).values()}
    with pytest.raises(ConfigError, match="text_embed runs on the host and has no engine; leave it out"):
        graphs_to_build(bundle, ["text_embed"])


def test_one_engine_serves_the_architectures_of_tensorrt_rtx() -> None:
    names = [(flavour.name, group) for flavour, group in group_by_flavour([90, 86, 100, 120])]
    assert names == [("tensorrt-rtx", (86, 120)), ("tensorrt", (90,)), ("tensorrt", (100,))]


def test_gpus_without_bfloat16_are_refused() -> None:
    with pytest.raises(ConfigError, match="sm_75 has no bfloat16, in which engines compute; sm_80 is the first"):
        check_bf16(parse_targets(["sm_75,rtx5090"]))


def test_weights_that_are_compiled_in_are_verified(bundle: Bundle) -> None:
    weights = bundle.weights("vae")
    content = bytearray(weights.read_bytes())
    content[-100] ^= 64
    weights.write_bytes(content)
    options = EngineOptions(bundle.model.video.clip, (89,), only=("vae_decode_first",))
    with pytest.raises(BundleError, match=r"vae\.safetensors: damaged; .* wanforge import --resume"):
        build_engines(bundle, rtx(), options)
    weights.unlink()
    with pytest.raises(BundleError, match=r"vae\.safetensors is missing; .* wanforge import --resume"):
        build_engines(bundle, rtx(), options)


def test_a_graph_that_another_import_deleted_is_no_fault_of_the_library(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(library: object, job: BuildJob, sms: object, **options: object) -> None:
        manifest = read_manifest(bundle.root)
        write_manifest(bundle.root, msgspec.structs.replace(manifest, recipe=load_recipe("w8a8-row")))
        raise WanforgeError("cannot read time.onnx")

    monkeypatch.setattr(build_module, "build_apart", delete)
    with pytest.raises(BundleError, match="was imported again in the meantime; run the command again"):
        build_engines(bundle, rtx(), EngineOptions(CLIP, (120,), only=("time",)))
