"""Clips and manifests go to a folder, which stays open to others, or to a bucket."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from tests.command_line import succeeded
from tests.runtime.batch.conftest import SMALL, clips
from wanforge.errors import ResourceError
from wanforge.runtime.batch.places import LOCK, STAGING, opened, sole_run
from wanforge.runtime.service.results.base import MANIFEST, StorageError


@pytest.mark.slow
def test_a_bucket_gets_the_same_clips(tinywan: Path, undisturbed: Path, bucket: str) -> None:
    words = ("batch", undisturbed / "prompts.txt", "--bundle", tinywan, "--out", bucket, *SMALL, "--json")
    expected = clips(undisturbed / "clips")
    assert json.loads(succeeded(*words).stdout)["made"] == len(expected)
    with opened(bucket) as storage:
        assert {each.name: storage.local(each.name).read_bytes() for each in storage.stored()} == expected
        lines = [json.loads(line) for line in storage.local(MANIFEST).read_text().splitlines()]
        assert {line["file"] for line in lines} == set(expected)
    assert json.loads(succeeded(*words).stdout)["there"] == len(expected)


def test_a_folder_stays_as_open_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "clips"
    out.mkdir(mode=0o755)
    with opened(str(out)) as storage, sole_run(str(out), storage):
        assert storage.staging().stat().st_mode & 0o777 == 0o700
    assert out.stat().st_mode & 0o777 == 0o755


UNFINISHED = ("0123456789abcdef" * 2, "actor-7-1a2b3c4d")


def test_what_another_run_left_unfinished_is_deleted(tmp_path: Path) -> None:
    with opened(str(tmp_path)) as storage:
        for name in UNFINISHED:
            (storage.staging() / name).mkdir()
            (storage.staging() / name / "video.mp4").write_bytes(b"half")
        with sole_run(str(tmp_path), storage):
            assert [path.name for path in storage.staging().iterdir()] == [LOCK]
            with pytest.raises(ResourceError, match="another batch"), sole_run(str(tmp_path), storage):
                pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_nothing_but_the_file_of_its_lock(tmp_path: Path, fails: bool) -> None:
    with opened(str(tmp_path)) as storage, suppress(ZeroDivisionError), sole_run(str(tmp_path), storage):
        locked = (storage.staging() / LOCK).stat().st_ino
        (storage.staging() / UNFINISHED[0]).mkdir()
        if fails:
            raise ZeroDivisionError
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [STAGING, f"{STAGING}/{LOCK}"]
    assert (tmp_path / STAGING / LOCK).stat().st_ino == locked  # another run may be waiting to lock it


def test_folders_of_others_stay(tmp_path: Path) -> None:
    theirs = [tmp_path / "staging" / UNFINISHED[0] / "video.mp4", tmp_path / STAGING / "mine" / "thesis.txt"]
    for file in theirs:
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    with opened(str(tmp_path)) as storage, sole_run(str(tmp_path), storage):
        pass
    assert [file.read_text() for file in theirs] == ["mine", "mine"]


def test_only_clips_and_the_manifest_have_names(tmp_path: Path) -> None:
    with opened(str(tmp_path)) as storage:
        storage.put(MANIFEST, b"")
        with pytest.raises(StorageError):
            storage.put("../manifest.jsonl", b"")
