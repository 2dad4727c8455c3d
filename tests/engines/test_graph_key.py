"""Graphs that would be written differently now are not run, unless that is asked for."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from wanforge.engines import graph_key
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.graph_key import check_current, stale_graphs
from wanforge.errors import BundleError

BLOCK, HEAD = "onnx/fp32/block.onnx", "onnx/fp32/head.onnx"


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> Bundle:
    """A bundle whose graph `BLOCK` is stale."""
    bundle = Bundle.open(Path(shutil.copytree(bundle_of("tiny-t2v", "bf16").root, tmp_path / "bundle")))
    record = bundle.manifest.files[BLOCK]
    bundle.add({BLOCK: msgspec.structs.replace(record, key={**record.key, "code": "older"})})
    return bundle


def test_a_stale_graph_is_refused_with_both_ways_on(bundle: Bundle) -> None:
    ways = rf"wanforge export {bundle.root}, .* take --stale-ok, and Bundle\.open takes stale_ok=True"
    complaint = f"{BLOCK} is stale, code changed; write it again with: {ways}"
    with pytest.raises(BundleError, match=complaint):
        check_current(bundle, [HEAD, BLOCK])


def test_graphs_that_are_not_needed_may_be_stale(bundle: Bundle) -> None:
    assert stale_graphs(bundle) == {BLOCK: "code changed"}
    check_current(bundle, [HEAD])


def test_a_bundle_can_be_opened_for_its_stale_graphs(bundle: Bundle) -> None:
    check_current(Bundle.open(bundle.root, stale_ok=True), [BLOCK])


def test_nothing_is_computed_where_no_graph_is_needed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_key, "stale_graphs", None)
    check_current(bundle, ["weights/dit.safetensors"])


@pytest.mark.parametrize(
    "name", ["runtime/reference/dit.py", "exporter/lowerings.py", "plugins/w8a8_linear/onnx_function.py"]
)
def test_a_change_of_the_code_makes_every_graph_stale(
    bundle_of: Callable[[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    package = Path(shutil.copytree(graph_key.PACKAGE, tmp_path / "wanforge", ignore=shutil.ignore_patterns("*.so")))
    monkeypatch.setattr(graph_key, "PACKAGE", package)
    bundle = bundle_of("tiny-t2v", "bf16")
    assert not stale_graphs(bundle)
    os.chmod(package / name, 0o644)
    (package / name).write_text((package / name).read_text() + "\n# A remark.\n")
    assert set(stale_graphs(bundle)) == {each for each in bundle.manifest.files if each.endswith(".onnx")}
