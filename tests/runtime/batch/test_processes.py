"""What the storage refuses fails the clip, as everything else does that may go well the next time."""

from pathlib import Path

import pytest

from wanforge.runtime.batch.orders import ClipOrder
from wanforge.runtime.batch.processes import stored
from wanforge.runtime.batch.team import FailedError
from wanforge.runtime.service.child.messages import ClipMade
from wanforge.runtime.service.job import Failure
from wanforge.runtime.service.results.base import StorageError
from wanforge.runtime.service.results.folder import FolderStorage


@pytest.mark.parametrize("code", ["disk_full", "storage_unreachable"])
def test_a_clip_that_cannot_be_stored_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def refuse(*_: object) -> None:
        raise StorageError(code, "the storage does not answer")

    monkeypatch.setattr(FolderStorage, "add", refuse)
    made = ClipMade("ticket", {"video": "video.mp4"}, "ort", {}, {"bytes": 3})
    with pytest.raises(FailedError) as caught:
        stored(FolderStorage(tmp_path), ClipOrder(key="a" * 32, request={}), made, tmp_path, {})
    assert caught.value.failure == Failure(code, "the storage does not answer")
