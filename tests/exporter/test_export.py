"""An export takes effect as a whole and leaves behind no graph that the manifest does not name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import BundleError
from wanforge.exporter import export as exporting
from wanforge.exporter.export import export


@pytest.fixture
def bundle(bundle_of: Callable[[str, str], Bundle], tmp_path: Path) -> Bundle:
    """An exported bundle that a test may change."""
    return Bundle.open(Path(shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, tmp_path / "bundle")))


def graphs_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.onnx")}


def recorded(root: Path) -> set[str]:
    return {name for name in Bundle.open(root).manifest.files if name.endswith(".onnx")}


def make_stale(bundle: Bundle) -> None:
    files = bundle.manifest.files.items()
    bundle.add({name: msgspec.structs.replace(r, key={**r.key, "code": "other"}) for name, r in files if r.key})


@pytest.mark.slow
def test_a_graph_that_fails_the_check_leaves_every_graph_as_it_was(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(path for path in bundle.root.rglob("*") if path.is_file())
    checked: list[str] = []

    def refusing(path: str) -> None:
        checked.append(path)
        if len(checked) == 20:
            raise ValueError("not a graph")

    for name in recorded(bundle.root):
        (bundle.root / name).write_bytes(b"as it was")
    monkeypatch.setattr(exporting, "check", refusing)
    with pytest.raises(ValueError, match="not a graph"):
        export(bundle)
    assert set(graphs_of(bundle.root).values()) == {b"as it was"}
    assert sorted(path for path in bundle.root.rglob("*") if path.is_file()) == files


def test_damaged_weights_are_named_with_their_remedy(bundle: Bundle) -> None:
    weights = bundle.weights("dit")
    os.truncate(weights, weights.stat().st_size - 1000)
    with pytest.raises(BundleError, match=f"damaged; .*; write it again with: wanforge import --resume {bundle.root}"):
        export(bundle)


def test_one_type_written_again_keeps_the_others(bundle: Bundle) -> None:
    before = graphs_of(bundle.root)
    done = export(bundle, ["fp32"])
    assert all("fp32" in name for name in done.written)
    assert graphs_of(bundle.root) == before
    assert recorded(bundle.root) == set(before)
    bundle.verify(bundle.manifest.files, again=True)


def test_stale_graphs_of_other_types_are_deleted(bundle: Bundle) -> None:
    make_stale(bundle)
    done = export(bundle, ["fp32"])
    assert set(done.written) == set(graphs_of(bundle.root)) == recorded(bundle.root)
    bundle.verify(bundle.manifest.files, again=True)


@pytest.mark.slow
def test_an_export_deletes_no_graphs_that_another_has_written_since(bundle: Bundle) -> None:
    make_stale(bundle)
    late = Bundle.open(bundle.root)
    done = [export(bundle, ["fp32"]), export(late, ["fp16"])]
    written = {name for each in done for name in each.written}
    assert written == set(graphs_of(bundle.root)) == recorded(bundle.root)
    late.verify(late.manifest.files, again=True)
