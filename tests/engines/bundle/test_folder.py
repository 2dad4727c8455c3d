"""A bundle's files are its own: no link leads out of it, and nothing but files is read."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from wanforge.engines.bundle import folder
from wanforge.engines.bundle.folder import inside, read_unlinked
from wanforge.errors import BundleError


@pytest.mark.parametrize("link", ["onnx", "onnx/fp32"])
def test_folders_that_are_links_are_refused(tmp_path: Path, link: str) -> None:
    root, elsewhere = tmp_path / "bundle", tmp_path / "elsewhere"
    (root / link).parent.mkdir(parents=True)
    elsewhere.mkdir()
    (root / link).symlink_to(elsewhere)
    with pytest.raises(BundleError, match=f"{link}: is a link, and the folders of a bundle are its own; remove it"):
        inside(root, "onnx/fp32/block.onnx")


def test_a_bundle_may_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    assert inside(tmp_path / "link", "onnx/fp32/block.onnx") == tmp_path / "link/onnx/fp32/block.onnx"


@pytest.mark.parametrize(
    "make",
    [lambda path: path.symlink_to("/etc/hostname"), Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")],
    ids=["link", "folder", "fifo", "device"],
)
def test_only_files_are_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "some")
    with pytest.raises(BundleError, match="some: is not a file but a link, a folder or a device"):
        read_unlinked(tmp_path / "some")


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MOST_BYTES", 10)
    (tmp_path / "some").write_bytes(bytes(10))
    assert read_unlinked(tmp_path / "some") == bytes(10)
    (tmp_path / "some").write_bytes(bytes(11))
    with pytest.raises(BundleError, match="more than 10 bytes"):
        read_unlinked(tmp_path / "some")
