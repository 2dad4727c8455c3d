"""Objects are stored whole or not at all, in a folder and in S3, and those that nobody needs are deleted."""

import os
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.runtime.service.store.rig import claimed, submission
from tests.s3 import s3_server, with_bucket
from wanforge.errors import ConfigError
from wanforge.runtime.service.job import Result
from wanforge.runtime.service.results.base import ObjectStorage, StorageError, new_name
from wanforge.runtime.service.results.folder import FolderStorage
from wanforge.runtime.service.results.opening import open_storage
from wanforge.runtime.service.results.sweeping import delete_orphans, delete_removable, delete_unfinished
from wanforge.runtime.service.store.sql_store import SqlStore, open_store

OLD = 3600.0


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The address of a server that speaks S3's protocol."""
    with s3_server() as url:
        yield url


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStorage:
    if request.param == "folder":
        return FolderStorage(tmp_path / "results", least_free=0)
    for name, value in settings(request.getfixturevalue("s3_url")).items():
        monkeypatch.setenv(name, value)
    return open_storage("s3://clips/made", tmp_path)


def settings(url: str) -> dict[str, str]:
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
    return with_bucket(url, "clips")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    opened = open_store(tmp_path / "jobs.sqlite")
    assert isinstance(opened, SqlStore)
    yield opened
    opened.close()


def stored(storage: ObjectStorage) -> set[str]:
    return {each.name for each in storage.stored()}


def test_objects_are_what_was_stored(storage: ObjectStorage) -> None:
    first, second = new_name(".png"), new_name(".mp4")
    storage.put(first, b"picture")
    made = storage.staging() / "clip.mp4"
    made.write_bytes(b"clip" * 1000)
    storage.add(second, made)
    assert not made.exists()
    assert storage.local(first).read_bytes() == b"picture"
    assert storage.local(second).read_bytes() == b"clip" * 1000
    assert {(each.name, each.bytes) for each in storage.stored()} == {(first, 7), (second, 4000)}
    assert all(abs(each.changed_at - time.time()) < 60 for each in storage.stored())
    storage.delete([first])
    storage.delete([first, new_name(".png")])
    assert stored(storage) == {second}
    with pytest.raises(StorageError, match="not there any more") as caught:
        storage.local(first)
    assert caught.value.code == "object_gone"


@pytest.mark.parametrize("name", ["../jobs.sqlite", "/etc/passwd", "staging", "a" * 16, f"{'a' * 16}.mp4/x", ""])
def test_names_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    storage = FolderStorage(tmp_path / "results", least_free=0)
    (tmp_path / "jobs.sqlite").touch()
    for use in (storage.local, lambda name: storage.delete([name]), lambda name: storage.put(name, b"")):
        with pytest.raises(StorageError, match="there is no object"):
            use(name)
    assert (tmp_path / "jobs.sqlite").exists()


def test_the_storage_takes_what_is_made_but_no_uploads_where_little_is_free(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path, least_free=1 << 60)
    made, name = storage.staging() / "clip.mp4", new_name(".mp4")
    made.touch()
    storage.add(name, made)
    with pytest.raises(StorageError, match="have to stay free") as caught:
        storage.put(new_name(".png"), b"x")
    assert caught.value.code == "disk_full"
    assert stored(storage) == {name}


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FolderStorage(tmp_path, least_free=0)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="its disk is full") as caught:
        storage.put(new_name(".png"), b"x")
    assert caught.value.code == "disk_full"
    assert [path.name for path in tmp_path.iterdir()] == ["staging"]


@pytest.mark.slow
def test_a_copy_that_is_cut_off_is_not_kept(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings(s3_url).items():
        monkeypatch.setenv(name, value)
    storage: Any = open_storage("s3://clips", tmp_path)
    name = new_name(".mp4")
    storage.put(name, b"whole")

    def cut_off(*arguments: Any) -> Iterator[bytes]:
        yield b"wh"
        raise storage._error("connection reset")

    whole = storage._obstore
    storage._obstore = SimpleNamespace(get=cut_off)
    with pytest.raises(StorageError, match="connection reset"):
        storage.local(name)
    storage._obstore = whole
    assert storage.local(name).read_bytes() == b"whole"


@pytest.mark.slow
def test_a_server_that_is_away_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed (the extra s3)")
    from wanforge.runtime.service.results.s3 import S3Storage

    away = {"endpoint": "http://127.0.0.1:9", "region": "x", "skip_signature": True}
    retries = {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
    storage = S3Storage("s3://clips", tmp_path, {**away, **retries})
    with pytest.raises(StorageError, match="s3://clips") as caught:
        storage.put(new_name(".png"), b"x")
    assert caught.value.code == "storage_unreachable"


def test_deleted_results_are_removed_even_after_a_kill(tmp_path: Path, store: SqlStore) -> None:
    storage = FolderStorage(tmp_path / "results", least_free=0)
    store.submit(submission())
    job, name = claimed(store), new_name(".mp4")
    storage.put(name, b"clip")
    assert store.complete(job.lease, Result(objects={"video": name}, backend="torch"))
    store.delete(job.id)
    storage.delete([name])  # and the process is killed before it tells the store
    assert delete_removable(storage, store) == 1
    assert delete_removable(storage, store) == 0
    assert stored(storage) == set()


def test_orphans_are_deleted_after_a_while(tmp_path: Path, store: SqlStore) -> None:
    storage = FolderStorage(tmp_path / "results", least_free=0)
    needed, orphan, young = (new_name(".png") for _ in range(3))
    for name in (needed, orphan, young):
        storage.put(name, b"x")
    for name in (needed, orphan):
        os.utime(storage.root / name, (time.time() - 2 * OLD,) * 2)
    store.submit(submission(objects=(needed,)))
    assert delete_orphans(storage, store, OLD) == [orphan]
    assert stored(storage) == {needed, young}
    assert storage.staging().is_dir()


def test_results_cannot_be_kept_in_an_unknown_kind_of_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="results is 'gs://clips/x'"):
        open_storage("gs://clips/x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_clips_that_another_service_is_making_are_left_alone(tmp_path: Path) -> None:
    staging = FolderStorage(tmp_path / "results", least_free=0).staging()
    own, other, old = (
        staging / name for name in ("host-worker 0-aa-job-1", "host-worker 0-bb-job-1", "host-worker 0-cc-job-1")
    )
    for folder in (own, other, old):
        folder.mkdir()
        (folder / "video.mp4").write_bytes(b"clip")
    os.utime(old, (time.time() - 2 * 86_400.0,) * 2)
    delete_unfinished(staging, ["host/worker 0/aa"])
    assert list(staging.iterdir()) == [other]


def test_a_file_of_another_disk_is_copied(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    storage, made = FolderStorage(tmp_path, least_free=0), memory / new_name(".mp4")
    made.write_bytes(b"clip")
    try:
        name = new_name(".mp4")
        storage.add(name, made)
        assert storage.local(name).read_bytes() == b"clip"
    finally:
        made.unlink(missing_ok=True)
        shutil.rmtree(tmp_path)
