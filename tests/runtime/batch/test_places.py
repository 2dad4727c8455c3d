"""Clips and manifests go to a folder, which stays open to others, or to a bucket."""

import json
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.command_line import succeeded
from tests.runtime.batch.conftest import SMALL, clips
from wanforge.errors import ResourceError
from wanforge.runtime.batch.places import opened, sole_run
from wanforge.runtime.service.results.base import MANIFEST, StorageError


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server that speaks S3's protocol."""
    missing = [name for name in ("obstore", "moto", "flask", "flask_cors") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed (the extra dev)")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/batches", method="PUT")).close()
    for name, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
    ):
        monkeypatch.setenv(name, value)
    yield "s3://batches/tonight"
    server.stop()


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
    assert list(out.iterdir()) == []


def test_what_another_run_left_unfinished_is_deleted(tmp_path: Path) -> None:
    with opened(str(tmp_path)) as storage:
        (storage.staging() / "left").mkdir()
        (storage.staging() / "left" / "video.mp4").write_bytes(b"half")
        with sole_run(str(tmp_path), storage):
            assert not (storage.staging() / "left").exists()
            with pytest.raises(ResourceError, match="another batch"), sole_run(str(tmp_path), storage):
                pass


def test_only_clips_and_the_manifest_have_names(tmp_path: Path) -> None:
    with opened(str(tmp_path)) as storage:
        storage.put(MANIFEST, b"")
        with pytest.raises(StorageError):
            storage.put("../manifest.jsonl", b"")
