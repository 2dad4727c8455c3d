"""Every graph of a tiny model compiles for several architectures, and is fused as it should be; breaks are caught."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.tensorrt_flavours import rtx
from wanforge.cli import cli
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines import build as engine_plan
from wanforge.engines.build import build_engines, faults, plan
from wanforge.engines.builder import Built, build
from wanforge.engines.bundle.bundle import Bundle, graph_name
from wanforge.engines.files import built_clips, find_engine, read_engine
from wanforge.engines.sizes import covers, profile, sizes
from wanforge.errors import BundleError, ConfigError, ResourceError
from wanforge.plugins.launching.launch import Launch
from wanforge.runtime.commands.build import groups, sms_of
from wanforge.runtime.graphs import graphs

CLIP = ClipShape(192, 128, 17)


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> Bundle:
    rtx()
    shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def built(bundle: Bundle, graph: str, *, plugins: bool = True, dtype: str = "bfloat16") -> Built:
    """One graph of a bundle, compiled for sm_89."""
    one = graphs(bundle.model, bundle.recipe)[graph]
    job, *_ = plan(bundle, one, CLIP, sizes(bundle.model, bundle.recipe, CLIP), rtx(), [89], plugins)
    path = bundle.root / graph_name(graph, dtype, one.has_constants)
    return build(rtx(), replace(job, onnx=path), [89], plugins=plugins)


@pytest.mark.parametrize(
    ("model", "recipe", "sms"),
    [("tiny-t2v", "w8a8", [89, 120]), ("tiny-i2v", "w8a8", [80, 86]), ("tiny-t2v", "bf16", [120])],
)
def test_every_graph_compiles_and_is_fused(
    model: str, recipe: str, sms: Sequence[int], bundle_of: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    library = rtx()
    shutil.copytree(bundle_of(model, recipe).root, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    engines = build_engines(bundle, CLIP, library, sms)
    assert [engine.graph for engine in engines] == list(graphs(bundle.model, bundle.recipe))
    assert [engine.faults for engine in engines] == [[] for _ in engines]
    plugins = {engine.graph: engine.plugins for engine in engines if engine.plugins}
    assert plugins == ({"block": 9, "cross_kv": 2} if recipe == "w8a8" else {})
    for engine in engines:
        assert len(read_engine(bundle, engine.name)) == engine.bytes
    again = build_engines(bundle, CLIP, library, sms)
    assert all(engine.is_cached for engine in again)


def test_one_engine_serves_every_smaller_clip(bundle: Bundle) -> None:
    small, large = ClipShape(96, 64, 9), ClipShape(208, 128, 17)
    (engine,) = build_engines(bundle, CLIP, rtx(), [89], only=["block"], smaller=True)
    assert engine.name == "engines/sm_89/up-to-192x128x17/block.bf16.engine"
    assert engine.faults == []
    one = graphs(bundle.model, bundle.recipe)["block"]
    onnx = graph_name("block", "bfloat16", one.has_constants)

    def found(clip: ClipShape) -> str:
        return find_engine(bundle, onnx, 89, profile(one, sizes(bundle.model, bundle.recipe, clip)))

    assert found(small) == found(CLIP) == engine.name
    with pytest.raises(
        BundleError, match=r"no engine of onnx/bf16/block\.onnx for sm_89 and .*tokens=520; there is sm_89"
    ):
        found(large)
    (exact,) = build_engines(bundle, small, rtx(), [89], only=["block"])
    assert (found(small), found(CLIP)) == (exact.name, engine.name)
    assert built_clips(bundle) == [CLIP, small]


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


def test_the_unregistered_plugin_is_caught(bundle: Bundle) -> None:
    found = faults(built(bundle, "cross_kv", plugins=False), "cross_kv", bundle.recipe)
    assert found[0] == "2 ops should be plugins; 0 were taken and 0 compiled"
    assert "products in float32" in found[1]
    assert faults(built(bundle, "cross_kv", plugins=False), "cross_kv", bundle.recipe, plugins=False) == []


def test_a_leak_of_float32_is_caught(bundle: Bundle) -> None:
    (fault,) = faults(built(bundle, "stem", dtype="float32"), "stem", bundle.recipe)
    assert "1 products in float32" in fault
    assert faults(built(bundle, "stem"), "stem", bundle.recipe) == []


def test_attention_that_is_not_fused_is_caught(bundle: Bundle) -> None:
    one = built(bundle, "text_block")
    assert faults(one, "text_block", bundle.recipe) == []
    without = tuple(layer for layer in one.layers if not layer.is_attention)
    assert faults(replace(one, layers=without), "text_block", bundle.recipe) == ["0 fused attentions, of 1"]


def test_sizes_are_the_clips_and_ranges_of_requests() -> None:
    model, recipe = load_model("tiny-t2v"), load_recipe("w8a8")
    found = {name: str(size) for name, size in sizes(model, recipe, CLIP).items()}
    assert found == {
        "tokens": "480",
        "latent_height": "16",
        "latent_width": "24",
        "prompt_tokens": "1..512",
        "context_rows": "1..512",
        "slots": "1..8",
    }


def test_too_little_memory_is_said_before_the_start(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_plan, "available_bytes", lambda: 1e8)
    with pytest.raises(ResourceError, match=r"building stem takes about 0\.5 GB of memory, and 0\.1 GB are free"):
        build_engines(bundle, CLIP, rtx(), [120], only=["stem"])
    assert not (bundle.root / "engines").exists()


def test_the_kernels_of_plugins_are_compiled_on_demand(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Launch] = []
    monkeypatch.setattr(engine_plan, "compile_kernels", lambda launches, folder, progress: asked.extend(launches))
    arguments = ("build", bundle.root, "--target", "rtx3090,rtx4090", "--graph", "block", "--graph", "stem")
    code, said = run(*arguments, "--kernels")
    assert code == 0
    specialisations = {launch.specialisation for launch in asked}
    assert f"9 plugins, {len(specialisations)} kernels" in said
    assert {one.sm for one in specialisations} == {86, 89}
    attention = {
        one.sm: dict(one.constants)["ARITHMETIC"] for one in specialisations if one.kernel.endswith(".attention")
    }
    assert attention == {86: "sage_fp16", 89: "sage_fp8"}
    asked.clear()
    assert run(*arguments)[1].count("up to date") == 2 + 1
    assert not asked
    assert "1 built, 1 up to date" in run(*arguments, "--kernels")[1]
    assert asked


def test_an_interrupted_build_keeps_what_is_done(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(engine: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, CLIP, rtx(), [120], only=["stem", "head"], done=interrupt)
    again = build_engines(Bundle.open(bundle.root), CLIP, rtx(), [120], only=["stem", "head"])
    assert [engine.is_cached for engine in again] == [True, False]


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return 1, done.output + str(done.exception)
    return done.return_value or 0, done.output


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
    assert "installed is tensorrt-rtx 9.9; run: wanforge build" in said


def test_hopper_is_refused_and_the_rest_is_built(bundle: Bundle) -> None:
    code, said = run("build", bundle.root, "--target", "h100,rtx3090", "--graph", "stem")
    assert code == 1
    assert "1 built" in said
    assert "sm_90: " in said
    assert "tensorrt" in said.lower()
    assert (bundle.root / "engines" / "sm_86").is_dir()
    assert not (bundle.root / "engines" / "sm_90").exists()


def test_an_unknown_graph_is_refused(bundle: Bundle) -> None:
    assert (
        "no graph is called 'bolck'; known: text_embed"
        in run("build", bundle.root, "--target", "rtx5090", "--graph", "bolck")[1]
    )


def test_targets_are_architectures() -> None:
    assert sms_of("rtx5090, rtx5080,sm_86,h200") == [86, 90, 120]
    names = [(flavour.name, group) for flavour, group in groups([86, 90, 100, 120])]
    assert names == [("tensorrt-rtx", (86, 120)), ("tensorrt", (90,)), ("tensorrt", (100,))]
    with pytest.raises(ConfigError, match="no target is called 'rtx6090'; known: rtx5090"):
        sms_of("rtx6090")
    with pytest.raises(ConfigError, match="sm_75 has no bfloat16, in which engines compute; sm_80 is the first"):
        sms_of("sm_75,rtx5090")
