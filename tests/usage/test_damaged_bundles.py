"""Commands on bundles whose own files are damaged or were edited end with a message that names the file."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.usage.damage import damaged_bytes, edited, edits, few, refused, run
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import IMPORT, MANIFEST, Manifest, write_manifest

pytestmark = pytest.mark.slow
TARGET = ("--target", "rtx5090", "--resolution", "64x64", "--frames", "5")
CLIP = ("--prompt", "a circle", "--resolution", "64x64", "--frames", "5", "--steps", "1")


@pytest.fixture(scope="module")
def original(bundle_of: Callable[[str, str], Bundle]) -> Path:
    return bundle_of("tiny-t2v", "w8a8").root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def copy_of(original: Path, folder: Path) -> Path:
    """A bundle that an example may change."""
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    return Path(shutil.copytree(original, folder / "bundle"))


def use(bundle: Path) -> None:
    """Run the commands that read a bundle."""
    refused(run("inspect", bundle), str(bundle))
    refused(run("generate", bundle, *CLIP, "--out", bundle.parent / "clip.mp4"), str(bundle))


@few
@given(data=st.data())
def test_damaged_manifests(original: Path, folder: Path, data: st.DataObject) -> None:
    bundle = copy_of(original, folder)
    (bundle / MANIFEST).write_bytes(data.draw(damaged_bytes((original / MANIFEST).read_bytes())))
    use(bundle)


@few
@given(data=st.data())
def test_edited_manifests(original: Path, folder: Path, data: st.DataObject) -> None:
    """Half of the manifests have the right seal, as if wanforge itself had written them."""
    bundle, manifest = copy_of(original, folder), json.loads((original / MANIFEST).read_bytes())
    value = edited(manifest, data.draw(edits(manifest, ["model", "model", "recipe", "files", "files", "format"])))
    (bundle / MANIFEST).write_bytes(json.dumps(value).encode())
    if data.draw(st.booleans()):
        with suppress(msgspec.ValidationError, ValueError):
            write_manifest(bundle, msgspec.convert(value, Manifest))
    use(bundle)
    refused(run("build", bundle, *TARGET, "--graph", "time"), str(bundle))


@few
@given(data=st.data())
def test_edited_records_of_imports(original: Path, folder: Path, data: st.DataObject) -> None:
    bundle, record = copy_of(original, folder), json.loads((original / IMPORT).read_bytes())
    value = edited(record, data.draw(edits(record, ["arguments", "arguments", "finished", "replaced", "format"])))
    (bundle / IMPORT).write_bytes(json.dumps(value).encode())
    if not refused(run("import", "--resume", bundle), str(bundle)):
        assert not run("inspect", bundle, "--verify").exit_code
