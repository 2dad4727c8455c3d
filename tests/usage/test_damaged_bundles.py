"""Commands on bundles whose own files are damaged or were edited end with a message that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.usage.damage import damaged_bytes, edited, edits, few, refused, run
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import IMPORT, MANIFEST, Manifest, write_manifest

CLIP = ("--prompt", "a circle", "--resolution", "64x64", "--frames", "5", "--steps", "1")


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[[str, str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose files successive examples may replace."""
    folder = tmp_path_factory.mktemp("damaged") / "bundle"
    shutil.copytree(bundle_of("tiny-t2v", "w8a8").root, folder)
    run("inspect", folder, "--verify")
    return folder


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / MANIFEST).read_bytes())


def use(bundle: Path) -> None:
    """Run the commands that read a bundle."""
    refused(run("inspect", bundle), str(bundle))
    refused(run("generate", bundle, *CLIP, "--out", bundle.parent / "clip.mp4"), str(bundle))


@pytest.mark.slow
@few
@given(data=st.data())
def test_damaged_manifest(bundle: Path, manifest: dict[str, Any], data: st.DataObject) -> None:
    original = json.dumps(manifest).encode()
    (bundle / MANIFEST).write_bytes(data.draw(damaged_bytes(original)))
    use(bundle)


@pytest.mark.slow
@few
@given(data=st.data())
def test_edited_manifest(bundle: Path, manifest: dict[str, Any], data: st.DataObject) -> None:
    value = edited(manifest, data.draw(edits(manifest, ["model", "model", "recipe", "files", "files", "format"])))
    try:
        write_manifest(bundle, msgspec.convert(value, Manifest))
    except (msgspec.ValidationError, ValueError):
        (bundle / MANIFEST).write_bytes(json.dumps(value).encode())
    use(bundle)
    refused(
        run("build", bundle, "--target", "rtx5090", "--resolution", "64x64", "--frames", "5", "--graph", "time"),
        str(bundle),
    )


@pytest.mark.slow
@few
@given(data=st.data())
def test_edited_record_of_an_import(bundle: Path, manifest: dict[str, Any], data: st.DataObject) -> None:
    original = json.loads((bundle / IMPORT).read_bytes())
    value = edited(original, data.draw(edits(original, ["arguments", "arguments", "finished", "replaced", "format"])))
    (bundle / IMPORT).write_bytes(json.dumps(value).encode())
    refused(run("import", "--resume", bundle), str(bundle), "checkpoint")
    write_manifest(bundle, msgspec.convert(manifest, Manifest))
    (bundle / IMPORT).write_bytes(json.dumps(original).encode())
