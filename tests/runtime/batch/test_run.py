"""A run makes what is not there, and believes a file only if it has the size that the manifest says."""

import json
from pathlib import Path

import pytest

from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.batch.manifest import StoredClip, read_manifest
from wanforge.runtime.batch.orders import Defaults, Ordering
from wanforge.runtime.batch.run import BatchRun
from wanforge.runtime.inputs.prompts import PromptLine
from wanforge.runtime.service.results.base import MANIFEST
from wanforge.runtime.service.results.folder import FolderStorage

LINES = [PromptLine("A red circle.", number=1), PromptLine("A blue ring.", number=2)]


@pytest.fixture
def storage(tmp_path: Path) -> FolderStorage:
    return FolderStorage(tmp_path / "clips", least_free=0, is_private=False)


def new_run(tinywan: Path, storage: FolderStorage) -> BatchRun:
    bundle = Bundle.open(tinywan)
    return BatchRun(Ordering(bundle, Defaults(bundle.model.video.shape(None, None))), storage, str(storage.root))


def noted(storage: FolderStorage) -> dict[str, StoredClip | None]:
    return {key: line.stored_clip for key, line in read_manifest(storage).items()}


def test_a_file_without_a_line_in_the_manifest_is_there(tinywan: Path, storage: FolderStorage) -> None:
    first, second = new_run(tinywan, storage).read(LINES, skip_bad=False)
    storage.put(first.name, b"clip")
    run = new_run(tinywan, storage)
    assert run.read(LINES, skip_bad=False) == [second]
    assert run.endings == {first.key: StoredClip(bytes=4)}


def test_details_of_earlier_runs_are_kept(tinywan: Path, storage: FolderStorage) -> None:
    run = new_run(tinywan, storage)
    first, second = run.read(LINES, skip_bad=False)
    storage.put(first.name, b"clip")
    clip = StoredClip(bytes=4, sha256="0" * 64, backend="ort", seconds=1.5, stages={"text": 1.5}, attempts=2)
    run.endings[first.key] = clip
    run.note()
    again = new_run(tinywan, storage)
    assert again.read(LINES, skip_bad=False) == [second]
    assert again.endings == {first.key: clip} == noted(storage)
    again.make([], lambda count: pytest.fail("nothing is to be made"))
    assert noted(storage) == {first.key: clip}


def test_clips_of_other_prompts_stay_in_the_manifest(tinywan: Path, storage: FolderStorage) -> None:
    run = new_run(tinywan, storage)
    first, second = run.read(LINES, skip_bad=False)
    for order in (first, second):
        storage.put(order.name, b"clip")
        run.endings[order.key] = StoredClip(bytes=4, sha256=order.key * 2)
    run.note()
    for others in ([PromptLine("A green star.", number=1)], LINES[1:]):
        again = new_run(tinywan, storage)
        again.read(others, skip_bad=False)
        again.note()
    lines = [json.loads(line) for line in storage.local(MANIFEST).read_text().splitlines()]
    told = [(line["line"], line["prompt"], line["sha256"]) for line in lines]
    assert told == [(2, "A blue ring.", second.key * 2), (None, "A red circle.", first.key * 2)]
    storage.delete([first.name])
    again = new_run(tinywan, storage)
    again.read(LINES[1:], skip_bad=False)
    again.note()
    assert list(read_manifest(storage)) == [second.key]


def test_a_file_that_was_changed_is_missing(tinywan: Path, storage: FolderStorage) -> None:
    run = new_run(tinywan, storage)
    orders = run.read(LINES, skip_bad=False)
    for order in orders:
        storage.put(order.name, b"clip")
        run.endings[order.key] = StoredClip(bytes=4)
    run.note()
    storage.put(orders[0].name, b"other")
    assert new_run(tinywan, storage).read(LINES, skip_bad=False) == [orders[0]]


def test_a_damaged_manifest_is_written_anew(
    tinywan: Path, storage: FolderStorage, caplog: pytest.LogCaptureFixture
) -> None:
    storage.put(MANIFEST, b'{"line": 1')
    assert len(new_run(tinywan, storage).read(LINES, skip_bad=False)) == 2
    assert "cannot be read" in caplog.text
