"""An engine is loaded only if neither it nor anything it was built from has changed."""

import ast
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tools.house import imports, sources
from wanforge.configs.clip import ClipShape
from wanforge.engines import files as engine_files
from wanforge.engines.bundle.bundle import Bundle, weights_name
from wanforge.engines.bundle.remedies import remedy
from wanforge.engines.files import (
    built_clips,
    engine_key,
    engine_name,
    engines_of,
    find_engine,
    inputs_of,
    is_current,
    read_engine,
    stale_engines,
    write_engine,
)
from wanforge.engines.sizes import named_sizes, profile
from wanforge.errors import BundleError
from wanforge.exporter.export import export
from wanforge.plugins.tensorrt.library import RTX
from wanforge.plugins.tensorrt.plugin import ALL_OPS, OPS
from wanforge.plugins.tensorrt.sources import plugin_sources

ROOT = Path(__file__).parents[2]
CLIP = ClipShape(192, 128, 17)
ONNX = "onnx/bf16/block.onnx"
VERSION = "1.7.1.116"
FACTS = {"layers": 3, "plugins": 1, "activation_bytes": 0}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that a version of TensorRT-RTX is installed, so that the tests also pass on machines without it."""
    monkeypatch.setattr(engine_files, "installed_version", lambda flavour: VERSION if flavour is RTX else None)


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> Bundle:
    shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def key(bundle: Bundle, *, plugins: tuple[str, ...] = OPS, weights: str = "") -> dict[str, str]:
    return engine_key(
        bundle,
        library=f"tensorrt-rtx {VERSION}",
        sms=[120, 89],
        onnx=ONNX,
        weights=weights,
        plugins=plugins,
        profile="num_selected=1..8 tokens=480",
    )


@pytest.fixture
def name(bundle: Bundle) -> str:
    """The name of an engine in the bundle."""
    name = engine_name("block", [120, 89], CLIP)
    write_engine(bundle, name, b"plan", key(bundle), FACTS)
    return name


def test_names_say_what_an_engine_is_for() -> None:
    assert engine_name("block", [120, 89], CLIP) == "engines/sm_89+sm_120/192x128x17/block.bf16.engine"
    assert engine_name("time", [120], None) == "engines/sm_120/time.bf16.engine"


def test_an_engine_is_read_as_it_was_written(bundle: Bundle, name: str) -> None:
    opened = Bundle.open(bundle.root)
    assert read_engine(opened, name) == b"plan"
    assert is_current(opened, name, key(opened))
    assert opened.manifest.files[name].key["profile"] == "num_selected=1..8 tokens=480"
    assert not list(bundle.root.rglob("*.partial"))


def test_a_changed_byte_is_found(bundle: Bundle, name: str) -> None:
    (bundle.root / name).write_bytes(b"plam")
    assert not is_current(bundle, name, key(bundle))
    with pytest.raises(BundleError, match=r"damaged, or not built here; .*build it again with: wanforge build"):
        read_engine(bundle, name)


def test_a_foreign_engine_is_not_read(bundle: Bundle) -> None:
    foreign = bundle.root / "engines" / "sm_89" / "time.bf16.engine"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"plan")
    with pytest.raises(BundleError, match="is missing; build it again"):
        read_engine(bundle, "engines/sm_89/time.bf16.engine")


def test_another_version_makes_it_stale(bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_files, "installed_version", lambda flavour: "1.8.0" if flavour is RTX else None)
    assert stale_engines(bundle) == {name: "made by tensorrt-rtx 1.7.1.116, but tensorrt-rtx 1.8.0 is installed"}
    with pytest.raises(BundleError, match="stale, made by tensorrt-rtx"):
        read_engine(bundle, name)


def test_where_nothing_is_installed_no_version_is_wrong(
    bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_files, "installed_version", lambda flavour: None)
    assert stale_engines(bundle) == {}


def test_other_plugins_make_it_stale(bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without = engine_name("stem", [89], CLIP)
    write_engine(bundle, without, b"plan", key(bundle, plugins=()), FACTS)
    monkeypatch.setattr(engine_files, "plugin_digest", lambda plugins: "another")
    assert stale_engines(bundle) == {name: "the plugins changed"}


def test_an_engine_with_a_block_plugin_is_preferred(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is none, or a LoRA is computed beside the linears, the engine of single ops is."""
    ((whole, _),) = bundle.graphs("bfloat16", one_op=True).items()
    sizes = named_sizes(bundle.model, bundle.recipe, CLIP)
    for onnx, graph in {**bundle.graphs("bfloat16"), **bundle.graphs("bfloat16", one_op=True)}.items():
        plugins = ALL_OPS if onnx == whole else OPS
        made = key(bundle, plugins=plugins) | {"onnx": onnx, "profile": profile(inputs_of(graph), sizes)}
        digest = bundle.manifest.files[onnx].sha256[:16]
        write_engine(bundle, engine_name(graph.name, [89], CLIP), b"plan", made | {"graph": digest}, FACTS)
    name = engine_name("block_whole", [89], CLIP)
    assert stale_engines(bundle) == {}
    assert engines_of(bundle, CLIP, 89)["block"] == name
    digests = {OPS: key(bundle)["plugins"], ALL_OPS: "another"}
    monkeypatch.setattr(engine_files, "plugin_digest", digests.get)
    assert engines_of(bundle, CLIP, 89)["block"] == engine_name("block", [89], CLIP)
    bundle.forget([engine_name("block", [89], CLIP)])
    with pytest.raises(BundleError, match=r"block_whole.* is stale, the plugins changed; .* --block-plugin"):
        engines_of(bundle, CLIP, 89)


def test_other_flags_make_it_stale(bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_files, "FLAGS", ())
    assert stale_engines(bundle) == {name: "the builder's flags changed"}


def test_engines_from_bodies_and_for_smaller_clips_have_names_of_their_own() -> None:
    assert engine_name("block", [89], CLIP, bodies=True) == "engines/sm_89/192x128x17/block.bodies.bf16.engine"
    assert engine_name("block", [89], CLIP, smaller=True) == "engines/sm_89/up-to-192x128x17/block.bf16.engine"


def test_another_graph_or_recipe_makes_it_stale(bundle: Bundle, name: str) -> None:
    record = bundle.manifest.files[ONNX]
    bundle.add({ONNX: msgspec.structs.replace(record, sha256="0" * 64)})
    bundle.recipe = msgspec.structs.replace(bundle.recipe, name="other")
    assert stale_engines(bundle) == {name: f"{ONNX} changed and the recipe changed"}


def test_other_weights_make_an_engine_that_holds_them_stale(bundle: Bundle) -> None:
    weights, name = "weights/vae.safetensors", "engines/sm_89/vae.bf16.engine"
    write_engine(bundle, name, b"plan", key(bundle, weights=weights), FACTS)
    assert stale_engines(bundle) == {}
    bundle.add({weights: msgspec.structs.replace(bundle.manifest.files[weights], sha256="0" * 64)})
    assert stale_engines(bundle) == {name: f"{weights} changed"}


def test_an_export_leaves_engines_alone(bundle: Bundle, name: str) -> None:
    export(bundle, ["bf16"])
    assert read_engine(bundle, name) == b"plan"


@pytest.mark.parametrize("ops", [OPS, ALL_OPS])
def test_the_digest_covers_everything_that_a_plugin_imports(ops: tuple[str, ...]) -> None:
    modules = {name: path for name, path in sources(ROOT).items() if name.startswith("wanforge.plugins.")}
    waiting, needed = [f"wanforge.plugins.{op}.plugin" for op in ops], set[str]()
    while waiting:
        module = waiting.pop()
        needed.add(module)
        waiting += imports(ast.parse(modules[module].read_text()), set(modules)) - needed
    assert "wanforge.plugins.quantiser.fused" in needed
    assert {modules[name].resolve() for name in needed} <= {path.resolve() for path in plugin_sources(ops)}


def test_an_engine_is_stale_while_its_weights_are_forgotten(bundle: Bundle) -> None:
    weights = weights_name("vae")
    name = engine_name("vae_decode_first", (89,), None)
    write_engine(bundle, name, b"plan", key(bundle, weights=weights), FACTS)
    bundle.forget([weights])
    assert stale_engines(bundle) == {name: f"{weights} changed"}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({}, {"layers": 3, "plugins": 1}),
        ({"profile": "tokens=many"}, FACTS),
        ({"profile": "../x"}, FACTS),
    ],
)
def test_an_engine_with_an_incomplete_record_is_stale(
    bundle: Bundle, name: str, change: dict[str, str], facts: dict[str, int]
) -> None:
    record = msgspec.structs.replace(bundle.manifest.files[name], key={**key(bundle), **change}, facts=facts)
    bundle.add({name: record})
    assert stale_engines(bundle) == {name: "its record is not complete"}
    with pytest.raises(BundleError, match=r"no engine of onnx/bf16/block\.onnx for sm_89"):
        find_engine(bundle, ONNX, 89, "num_selected=1..8 tokens=480", CLIP)


def test_sizes_that_no_clip_has_are_refused(bundle: Bundle) -> None:
    graph = bundle.manifest.files[ONNX].graph
    assert graph is not None
    with pytest.raises(BundleError, match=r"inputs of unknown sizes \(depth\); .* export the bundle again"):
        inputs_of(msgspec.structs.replace(graph, inputs={"hidden": (1, "2*depth")}))


def test_names_that_no_engine_has_are_no_clips(bundle: Bundle) -> None:
    names = ["engines/sm_89/axbxc/block.bf16.engine", "engines/block", "engines/sm_89/1x1/time.bf16.engine"]
    bundle.add(dict.fromkeys(names, bundle.manifest.files[ONNX]))
    assert built_clips(bundle) == []
    for name in names:
        assert remedy(name, bundle.root).endswith("--target all")
