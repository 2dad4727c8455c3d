"""What a worker does while the job store cannot be used."""

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.runtime.service.store.rig import BUNDLE, claimed, submission
from tests.runtime.service.workers.test_heart import failing_at_first
from wanforge.runtime.service.catalogue import Asked
from wanforge.runtime.service.child.messages import BundlePlace, ClipMade, ClipStopped
from wanforge.runtime.service.job import State
from wanforge.runtime.service.live.terms import LIVE
from wanforge.runtime.service.results.base import StorageError
from wanforge.runtime.service.results.folder import FolderStorage
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.base import News, StoreError
from wanforge.runtime.service.store.sql_store import SqlStore, open_store
from wanforge.runtime.service.workers import worker as worker_module
from wanforge.runtime.service.workers.heart import Attempt, Heart
from wanforge.runtime.service.workers.settings import Seat, Supervision
from wanforge.runtime.service.workers.status import ClipKind
from wanforge.runtime.service.workers.worker import ClipWorker, Killed, Outcome, Shop

MADE = ClipMade("", {"video": "video.mp4"}, "torch", {"denoise": 1.0}, {})


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClipWorker:
    """A worker that is not running, and a file that its child has made."""
    monkeypatch.setattr(worker_module, "STORE_SECONDS", 0.01)
    store, settings = open_store(tmp_path / "jobs.sqlite"), Supervision(serve=ServeSettings())
    storage = FolderStorage(tmp_path / "results", least_free=0)
    (tmp_path / "video.mp4").write_bytes(b"clip")
    shop = Shop(settings, store, storage, Heart(store, settings.times), Event(), Event())
    return ClipWorker("worker 0", shop, Seat("", (0,)), ())


def finish(worker: ClipWorker, folder: Path) -> str:
    store: Any = worker.shop.store
    asked = Asked(
        **{"model": "tinywan", "recipe": "w8a8", "prompt": "a red circle", "width_px": 128, "height_px": 112},
        **{"frames": 21, "fps": 16, "seed": 0, "steps": 4},
    )
    worker.shop.store.submit(submission(request=msgspec.to_builtins(asked)))
    job = claimed(store)
    worker._settle(Attempt(job, lambda: None, folder), MADE)
    return job.id


def objects(worker: ClipWorker) -> int:
    return len(list(worker.shop.storage.stored()))


def test_a_result_waits_for_the_store(worker: ClipWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete, tries = SqlStore.complete, list[None]()

    def busy_at_first(*arguments: Any) -> bool:
        tries.append(None)
        if len(tries) < 3:
            raise StoreError("store_busy", "the job store is locked")
        return complete(*arguments)

    monkeypatch.setattr(SqlStore, "complete", busy_at_first)
    job = worker.shop.store.get(finish(worker, tmp_path))
    assert job is not None
    assert job.state is State.COMPLETED
    assert (len(tries), objects(worker)) == (3, 1)
    assert worker.status.outcomes == {"completed": 1}
    assert [each.kind for each in worker.status.stages] == [ClipKind("tinywan", "128x112", "w8a8")]


def test_a_result_that_may_have_been_recorded_is_kept(
    worker: ClipWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: Any) -> bool:
        worker.shop.is_ended.set()
        raise StoreError("store_unreachable", "the connection broke", is_unknown=True)

    monkeypatch.setattr(SqlStore, "complete", away)
    finish(worker, tmp_path)
    assert objects(worker) == 1


@pytest.mark.parametrize(
    ("code", "tries", "state"), [("storage_unreachable", 3, State.FAILED), ("disk_full", 1, State.QUEUED)]
)
def test_a_result_that_cannot_be_stored_fails_the_job_unless_it_can_wait_for_room(
    worker: ClipWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, tries: int, state: State
) -> None:
    tried = list[str]()

    def refuse(storage: FolderStorage, name: str, path: Path) -> None:
        tried.append(name)
        raise StorageError(code, "no")

    monkeypatch.setattr(FolderStorage, "add", refuse)
    job = worker.shop.store.get(finish(worker, tmp_path))
    assert job is not None
    assert (job.state, len(tried), objects(worker)) == (state, tries, 0)
    assert (None if job.error is None else job.error.code) == (code if state is State.FAILED else None)
    assert worker.shop.is_full.is_set() == (code == "disk_full")


def test_a_worker_goes_on_after_its_news_could_not_be_opened(
    worker: ClipWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_at_first(monkeypatch, StoreError("store_unreachable", "the connection broke"))
    turns = list[News]()

    def end(news: News) -> None:
        turns.append(news)
        worker.shop.is_closed.set()

    monkeypatch.setattr(worker, "_turn", end)
    worker.start()
    worker.join(5)
    assert len(turns) == 1
    assert worker.status.state == "ended"


def test_a_cold_worker_leaves_a_new_job_to_an_idle_one_that_is_warm_for_it(worker: ClipWorker) -> None:
    cold = ClipWorker("worker 1", worker.shop, worker.seat, (BundlePlace(BUNDLE, ""),))
    worker.bundles, worker.lease_name, cold.lease_name = cold.bundles, "warm", "cold"
    worker._warm = {BUNDLE: submission().shape}
    news = worker.shop.store.news()
    child: Any = SimpleNamespace(receive=lambda seconds: None)
    worker._child = cold._child = child
    for each in (worker, cold):
        each._turn(news)
    job = worker.shop.store.submit(submission()).job
    assert cold._claim() is None
    taken = worker._claim()
    assert taken is not None
    assert taken.id == job.id


@pytest.mark.parametrize(
    ("shape", "outcome", "state"),
    [
        (LIVE, Killed("it was ended", was_asked=True), State.FAILED),
        (LIVE, ClipStopped(""), State.FAILED),
        (LIVE, Killed("it has died", has_begun=False), State.QUEUED),
        ("128x112x21", Killed("it was ended", was_asked=True), State.QUEUED),
    ],
)
def test_a_stream_that_has_begun_is_never_tried_again(
    worker: ClipWorker, tmp_path: Path, shape: str, outcome: Outcome, state: State
) -> None:
    store: Any = worker.shop.store
    store.submit(submission(shape=shape))
    attempt = Attempt(claimed(store), lambda: None, tmp_path)
    worker._settle(attempt, outcome)
    assert store.get(attempt.job.id).state is state


@pytest.mark.parametrize(("shape", "state"), [(LIVE, State.FAILED), ("128x112x21", State.QUEUED)])
def test_a_stream_whose_worker_is_lost_fails(worker: ClipWorker, shape: str, state: State) -> None:
    store: Any = worker.shop.store
    store.submit(submission(shape=shape))
    job = claimed(store)
    assert store.release([job.lease.worker], counts=True) == [job.id]
    assert store.get(job.id).state is state
