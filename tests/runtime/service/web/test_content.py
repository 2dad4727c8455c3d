"""Downloads."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.runtime.service.served import MADE, Rig
from wanforge.runtime.service.results.previews import preview_name
from wanforge.runtime.service.web import content

WHOLE = MADE["video"][0]


def test_a_download_that_broke_off_is_taken_up(rig: Rig) -> None:
    path = f"/v1/videos/{rig.submit()['id']}/content"
    rig.make()
    first = rig.client.get(path, headers={"Range": "bytes=0-99"})
    assert (first.status_code, first.content) == (206, WHOLE[:100])
    rest = {"Range": "bytes=100-", "If-Range": first.headers["etag"]}
    assert rig.client.get(path, headers=rest).content == WHOLE[100:]
    beyond = rig.client.get(path, headers={"Range": "bytes=999999-"})
    assert beyond.status_code == 416


def test_there_is_nothing_to_download_before_the_end(rig: Rig) -> None:
    video = rig.submit()
    early = rig.client.get(f"/v1/videos/{video['id']}/content")
    assert (early.status_code, early.json()["error"]["code"]) == (404, "not_ready")
    assert early.headers["retry-after"] == "1"


def test_a_running_video_shows_what_its_latest_step_predicts(rig: Rig) -> None:
    path = f"/v1/videos/{rig.submit(steps=2)['id']}/content?variant=preview"
    job = rig.claim()

    def shown(stage: str) -> tuple[int, bytes]:
        assert rig.store.heartbeat(job.lease, stage, 10)
        found = rig.client.get(path)
        return found.status_code, found.content if found.status_code == 200 else b""

    assert shown("text") == shown("step 1") == (404, b"")
    assert shown("preview 1") == (404, b"")  # its bundle may have no preview decoder
    rig.service.objects.put(preview_name(job, 1), b"first")
    assert shown("preview 1") == shown("step 2") == (200, b"first")
    assert rig.client.get(path).headers["cache-control"] == "no-store"
    rig.service.objects.put(preview_name(job, 2), b"second")
    assert shown("preview 2") == shown("decode") == (200, b"second")
    rig.complete(job)
    assert rig.client.get(path).content == MADE["thumbnail"][0]


def test_downloads_run_nothing_in_a_browser(rig: Rig) -> None:
    video = rig.submit(prompt="<script>alert(1)</script> \"'; a red circle")
    rig.make()
    headers = rig.client.get(f"/v1/videos/{video['id']}/content").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in headers["content-security-policy"]
    assert headers["content-type"] == "video/mp4"
    assert "script" not in headers["content-disposition"]


def test_a_file_that_is_deleted_when_its_download_begins_is_sent_whole(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = rig.submit()
    rig.make()
    call = content.FileResponse.__call__

    async def delete_first(response: Any, *arguments: Any) -> None:
        for path in rig.service.objects.root.iterdir():
            path.unlink()
        await call(response, *arguments)

    monkeypatch.setattr(content.FileResponse, "__call__", delete_first)
    path = f"/v1/videos/{video['id']}/content"
    assert rig.client.get(path).content == MADE["video"][0]
    assert rig.client.get(path).status_code == 410


def test_a_copy_that_makes_room_for_another_is_fetched_again(tmp_path: Path) -> None:
    looks, path = list[str](), tmp_path / "copy"

    def local(name: str) -> Path:
        looks.append(name)
        if len(looks) == 2:
            path.write_bytes(b"clip")
        return path

    storage: Any = SimpleNamespace(local=local)
    with content.opened(storage, "a.mp4") as file:
        assert file.read() == b"clip"
