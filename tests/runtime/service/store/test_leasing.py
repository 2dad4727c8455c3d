"""What workers change: claims, heartbeats, and how attempts end."""

from typing import Any

import pytest

from tests.runtime.service.store.rig import (
    HEARTBEAT,
    Rig,
    broken_rules,
    claim,
    claimed,
    found,
    kinds,
    result,
    submission,
)
from wanforge.runtime.service.job import Failure, State
from wanforge.runtime.service.store.base import DurationKey, Offer
from wanforge.runtime.service.store.databases.database import Transaction

HOURS = 6 * 3600.0


def test_a_worker_gets_only_what_it_can_serve(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission(bundle="other"))
    wanted = store.submit(submission()).job
    job = claimed(store)
    assert (job.id, job.state, job.worker, job.attempt) == (wanted.id, State.IN_PROGRESS, "w1", 1)
    assert claim(store) is None
    assert store.claim(Offer("w2", ())) is None
    assert store.claim(Offer("w2", ("bundle-1", "other"))) is not None


def test_a_completed_job_has_its_result(rig: Rig) -> None:
    store = rig.open(result_seconds=100.0)
    store.submit(submission())
    job = claimed(store)
    rig.clock.seconds += 7
    assert store.complete(job.lease, result("a", "trt"))
    done = found(store, job.id)
    assert (done.state, done.result, done.progress) == (State.COMPLETED, result("a", "trt"), 100)
    assert (done.completed_at, done.expires_at) == (rig.clock.seconds, rig.clock.seconds + 100)
    assert store.durations(DurationKey("bundle-1", "832x480x81", 4)) == [7.0]
    assert store.durations(DurationKey("bundle-1", "832x480x81", 3)) == []


def test_a_worker_may_tell_of_an_end_twice(rig: Rig) -> None:
    store = rig.open()
    for _ in range(2):
        store.submit(submission())
    done, failed = claimed(store), claimed(store)
    for _ in range(2):
        assert store.complete(done.lease, result("a"))
        assert store.fail(failed.lease, Failure("out_of_memory", "it is too large"))
    assert kinds(store, done.id) == ["queued", "started", "completed"]
    assert found(store, failed.id).error == Failure("out_of_memory", "it is too large")
    assert store.events(failed.id)[-1].data["error"] == {"code": "out_of_memory", "message": "it is too large"}


def test_progress_is_told_once_and_never_decreases(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission())
    job = claimed(store)
    for stage, progress in (("denoise", 10), ("denoise", 10), ("denoise", 5), (None, 40), ("decode", 400)):
        assert store.heartbeat(job.lease, stage, progress).is_held
    told = [(event.data["stage"], event.data["progress"]) for event in store.events(job.id) if event.kind == "progress"]
    assert told == [("denoise", 10), ("denoise", 40), ("decode", 100)]


def test_heartbeats_keep_a_job(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission())
    job = claimed(store)
    for _ in range(20):
        rig.let_run(store, HEARTBEAT)
        assert store.heartbeat(job.lease, "denoise", 10).is_held
    assert claim(store, "w2") is None


def test_a_worker_that_is_silent_for_a_lease_loses_its_job(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission())
    lost = claimed(store, "w1")
    rig.let_run(store, 25)
    assert claim(store, "w2") is None
    rig.let_run(store, 5)
    again = claimed(store, "w2")
    assert (again.id, again.attempt, again.lost, again.progress) == (lost.id, 2, 1, 0)
    before = found(store, lost.id)
    assert not store.complete(lost.lease, result("late"))
    assert not store.fail(lost.lease, Failure("late", "late"))
    assert not store.requeue(lost.lease, counts=False)
    assert not store.stopped(lost.lease)
    assert not store.heartbeat(lost.lease, "denoise", 50).is_held
    assert found(store, lost.id) == before
    assert store.complete(again.lease, result("a"))
    assert broken_rules(store) == []


def test_claims_end_leases_by_themselves(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission())
    lost = claimed(store, "w1")
    for _ in range(5):
        rig.clock.seconds += HEARTBEAT
        assert claim(store, "w2") is None
    rig.clock.seconds += HEARTBEAT
    assert claimed(store, "w2").id == lost.id


def test_a_worker_that_claims_its_own_job_again_has_another_lease(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission())
    first = claimed(store, "w1")
    store.requeue(first.lease, counts=False)
    second = claimed(store, "w1")
    assert not store.complete(first.lease, result("late"))
    assert store.complete(second.lease, result("a"))


def test_a_job_that_kills_two_workers_fails(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission(objects=("picture.png",)))
    for _ in range(2):
        job = claimed(store)
        rig.let_run(store, 30)
    ended = found(store, job.id)
    assert ended.state == State.FAILED
    assert ended.error is not None
    assert ended.error.code == "worker_died"
    assert kinds(store, job.id) == ["queued", "started", "requeued", "started", "failed"]
    assert claim(store) is None
    assert store.removable() == ["picture.png"]
    assert broken_rules(store) == []


def test_stopping_the_service_counts_against_no_job(rig: Rig) -> None:
    store = rig.open()
    for _ in range(3):
        store.submit(submission())
    for _ in range(5):
        jobs = [claimed(store, "w1"), claimed(store, "w1"), claimed(store, "w2")]
        assert store.release(["w1"], counts=False) == [job.id for job in jobs[:2]]
        assert store.requeue(jobs[2].lease, counts=False)
    assert {claimed(store).lost for _ in range(3)} == {0}


def test_a_job_that_is_given_back_keeps_its_place(rig: Rig) -> None:
    store = rig.open()
    first = store.submit(submission()).job
    rig.clock.seconds += 1
    store.submit(submission())
    store.requeue(claimed(store).lease, counts=True)
    assert claimed(store).id == first.id


@pytest.mark.parametrize("jump", [-HOURS, HOURS, -HOURS / 2, 59.0])
def test_a_clock_that_jumps_ends_no_lease_before_the_next_heartbeat(rig: Rig, jump: float) -> None:
    store = rig.open()
    store.submit(submission())
    job = claimed(store, "w1")
    for _ in range(3):
        rig.let_run(store, HEARTBEAT)
        rig.clock.seconds += jump
        assert claim(store, "w2") is None
        assert store.sweep() == []
        assert store.heartbeat(job.lease).is_held
    rig.let_run(store, 30)
    assert claimed(store, "w2").attempt == 2


def test_a_dead_worker_loses_its_job_although_the_clock_is_moved_back(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission())
    job = claimed(store, "w1")
    rig.clock.seconds -= HOURS
    assert rig.let_run(store, 25) == []
    assert rig.let_run(store, 10) == [job.id]


def test_heartbeats_alone_do_not_wait_for_the_disk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    store, said = rig.open(), list[str]()
    question = "SHOW synchronous_commit" if "://" in rig.place else "PRAGMA synchronous"
    begin = store.database.begin

    def noted(connection: Any, **how: Any) -> Transaction:
        transaction = begin(connection, **how)
        said.append(str(dict(transaction.rows(question)[0]).popitem()[1]))
        return transaction

    monkeypatch.setattr(store.database, "begin", noted)
    store.submit(submission())
    job = claimed(store)
    store.heartbeat(job.lease, "step 1", 10)
    assert store.complete(job.lease, result("clip"))
    synced, not_synced = ("on", "off") if "://" in rig.place else ("2", "1")
    assert said == [synced, synced, not_synced, synced]
