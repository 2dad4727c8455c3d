"""Folders are listed to a bounded depth, and nothing is followed, opened or entered that should not be."""

import os
import shutil
from pathlib import Path

import pytest

from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import BundleError, CheckpointError
from wanforge.exporter.checkpoint.finder import listing
from wanforge.exporter.checkpoint.finder.listing import current_snapshot, list_folders

OUT = Path("new-bundle")


def checkpoints_in(folder: Path, out: Path = OUT) -> list[str]:
    return [str(path.relative_to(folder)) for path in list_folders([folder], out).checkpoints]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_files_are_sorted_by_what_they_may_be(tmp_path: Path) -> None:
    touch(tmp_path, "a.pth", "b.pt", "c.safetensors", "d.bin", "README.md", "tokenizer.json", "e.pth.partial")
    touch(tmp_path, "x/m-00001-of-00002.safetensors", "x/m-00002-of-00002.safetensors", "x/m.safetensors.index.json")
    touch(tmp_path, "y/m-00001-of-00002.safetensors")
    found = list_folders([tmp_path], OUT)
    assert checkpoints_in(tmp_path) == ["a.pth", "b.pt", "c.safetensors", "x/m.safetensors.index.json"]
    assert found.tokenizers == [tmp_path / "tokenizer.json"]
    assert found.unread == [tmp_path / "d.bin", tmp_path / "y" / "m-00001-of-00002.safetensors"]


def test_only_a_few_levels_are_looked_into(tmp_path: Path) -> None:
    touch(tmp_path, "1/2/3/4/a.pth", "1/2/3/4/5/b.pth")
    assert checkpoints_in(tmp_path) == ["1/2/3/4/a.pth"]


def test_too_many_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MOST_ENTRIES", 5)
    touch(tmp_path, "a.pth", "x/1", "x/2", "x/3")
    assert checkpoints_in(tmp_path) == ["a.pth"]
    touch(tmp_path, "x/4")
    with pytest.raises(CheckpointError, match="holds more than 5 files and folders; give the folder"):
        checkpoints_in(tmp_path)


def test_links_to_folders_are_not_followed_and_links_to_files_are(tmp_path: Path) -> None:
    touch(tmp_path, "outside/a.pth", "folder/b.pth")
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "folder" / "up").symlink_to(tmp_path)
    (tmp_path / "folder" / "loop.pth").symlink_to("loop.pth")
    (tmp_path / "folder" / "gone.pth").symlink_to("nothing")
    (tmp_path / "folder" / "c.pth").symlink_to(tmp_path / "outside" / "a.pth")
    assert checkpoints_in(tmp_path / "folder") == ["b.pth", "c.pth"]
    (tmp_path / "named").symlink_to("folder")
    assert checkpoints_in(tmp_path / "named") == ["b.pth", "c.pth"]


def test_what_is_no_regular_file_is_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pth")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    (tmp_path / "pipe.safetensors").symlink_to("fifo.pth")
    (tmp_path / "folder.pth").mkdir()
    touch(tmp_path, "a.pth", "models--owner--name/snapshots/abc/b.pth")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").symlink_to("/dev/null")
    assert checkpoints_in(tmp_path) == ["a.pth", "models--owner--name/snapshots/abc/b.pth"]
    (tmp_path / "models--owner--name" / "refs" / "main").unlink()
    os.mkfifo(tmp_path / "models--owner--name" / "refs" / "main")  # to open it would wait for a writer
    assert len(checkpoints_in(tmp_path)) == 2


def test_hidden_folders_and_those_that_cannot_be_read_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.pth", ".cache/huggingface/b.pth", "closed/c.pth")
    scandir = os.scandir

    def denied(folder: Path) -> object:
        if folder.name == "closed":
            raise PermissionError
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    assert checkpoints_in(tmp_path) == ["a.pth"]


def test_bundles_and_the_place_of_the_new_one_are_left_out(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    for name in ("bundle", "interrupted"):
        shutil.copytree(bundles["plain"].root, tmp_path / name)
    (tmp_path / "interrupted" / "manifest.json").unlink()
    touch(tmp_path, "a.pth", "out/b.pth", "weights/vae.safetensors")
    assert checkpoints_in(tmp_path, tmp_path / "out") == ["a.pth", "weights/vae.safetensors"]


def test_a_bundle_needs_no_import(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    root = Path(shutil.copytree(bundles["plain"].root, tmp_path / "my bundle"))
    with pytest.raises(BundleError, match=f"is a bundle already and needs no import; next: wanforge inspect '{root}'"):
        list_folders([root], OUT)
    interrupted = Path(shutil.copytree(root, tmp_path / "bundle"))
    (interrupted / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"was interrupted; continue it with: wanforge import --resume .*bundle$"):
        list_folders([interrupted], OUT)


def test_what_is_no_folder_of_checkpoint_files_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "empty/README.md", "a.pth", "bins/pytorch_model.bin")
    for folder, complaint in (
        ("gone", "gone: no such folder"),
        ("a.pth", "a.pth: is a file; give the folder that holds it, or the file itself with --dit"),
        ("empty", r"empty: no checkpoint files here .* 4 folders deep; give the folder that holds them"),
        ("bins", r"deep; it has pytorch_model\.bin; give the folder"),
        ("", "holds the checkpoint files; choose another folder for the bundle"),
    ):
        with pytest.raises(CheckpointError, match=complaint):
            list_folders([tmp_path / folder], tmp_path)


def test_a_repository_without_a_current_snapshot_is_refused_unless_it_has_only_one(tmp_path: Path) -> None:
    root = tmp_path / "models--owner--name"
    touch(root, "snapshots/abc/a.pth", "refs/main")
    assert current_snapshot(root) == root / "snapshots" / "abc"
    touch(root, "snapshots/def/a.pth", "outside/a.pth")
    for text in ("", "123", "../outside", "..", "abc/../def", "\xff" * 4000):
        (root / "refs" / "main").write_text(text)
        with pytest.raises(CheckpointError, match=r"there are 2 in .*snapshots \(abc, def\); give one of them"):
            current_snapshot(root)
    (root / "refs" / "main").write_text("def\n")
    assert current_snapshot(root) == root / "snapshots" / "def"
    shutil.rmtree(root / "snapshots")
    (root / "snapshots").mkdir()
    with pytest.raises(CheckpointError, match=r"there are 0 in .*snapshots \(none\)"):
        current_snapshot(root)
