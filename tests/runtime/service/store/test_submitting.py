"""What clients change: submitting, cancelling and deleting jobs."""

import pytest

from tests.runtime.service.store.rig import Rig, broken_rules, claim, claimed, found, kinds, result, submission
from wanforge.errors import RequestError
from wanforge.runtime.service.job import Failure, Idempotency, State
from wanforge.runtime.service.store.base import Quota, TurnedAwayError

DAY = 86_400.0


def test_a_submitted_job_is_as_it_was_sent(rig: Rig) -> None:
    sent = submission(priority=3, objects=("picture.png",), request={"prompt": "ein Kreis \u2028 ☃", "seed": 2**60})
    receipt = rig.open().submit(sent)
    job = found(rig.open(), receipt.job.id)
    assert receipt.is_new
    assert receipt.job == job
    assert {name: getattr(job, name) for name in ("owner", "bundle", "shape", "steps", "request", "priority")} == {
        name: getattr(sent, name) for name in ("owner", "bundle", "shape", "steps", "request", "priority")
    }
    assert (job.state, job.objects, job.created_at) == (State.QUEUED, ("picture.png",), rig.clock.seconds)


def test_a_repeated_key_leads_to_the_same_job(rig: Rig) -> None:
    store = rig.open()
    sent = submission(idempotency=Idempotency.of("k", b"body"))
    first = store.submit(sent)
    again = store.submit(sent)
    assert (again.job.id, again.is_new) == (first.job.id, False)
    known = store.earlier("ann", Idempotency.of("k", b"body"))
    assert known is not None
    assert known.id == first.job.id
    assert store.earlier("bob", Idempotency.of("k", b"body")) is None
    assert store.submit(submission("bob", idempotency=Idempotency.of("k", b"body"))).is_new
    with pytest.raises(TurnedAwayError, match=f"another request, job {first.job.id}") as refused:
        store.submit(submission(idempotency=Idempotency.of("k", b"other body")))
    assert (refused.value.code, refused.value.retry_after) == ("idempotency_conflict", None)


def test_a_key_is_forgotten_after_a_day(rig: Rig) -> None:
    store = rig.open()
    sent = submission(idempotency=Idempotency.of("k", b"body"))
    first = store.submit(sent).job
    rig.clock.seconds += DAY - 700
    rig.let_run(store, 650)
    assert not store.submit(sent).is_new
    rig.let_run(store, 60)
    again = store.submit(sent)
    assert again.is_new
    assert again.job.id != first.id


def test_a_key_outlives_a_full_queue(rig: Rig) -> None:
    store = rig.open(most_queued=1)
    sent = submission(idempotency=Idempotency.of("k", b"body"))
    first = store.submit(sent).job
    assert store.submit(sent).job.id == first.id


def test_a_full_queue_tells_when_to_come_back(rig: Rig) -> None:
    store = rig.open(most_queued=2)
    store.submit(submission())
    job = claimed(store)
    rig.clock.seconds += 8
    store.complete(job.lease, result("a"))
    for owner in ("ann", "bob"):
        store.submit(submission(owner))
    with pytest.raises(TurnedAwayError, match="2 of at most 2 jobs") as refused:
        store.submit(submission())
    assert (refused.value.code, refused.value.retry_after) == ("queue_full", 8)
    claimed(store)
    assert store.submit(submission()).is_new


def test_an_owner_may_queue_as_many_jobs_as_the_quota_says(rig: Rig) -> None:
    store = rig.open(quota=Quota(queued=1))
    store.set_quota("bob", Quota(queued=2))
    store.submit(submission("ann"))
    store.submit(submission("bob"))
    store.submit(submission("bob"))
    for owner in ("ann", "bob"):
        with pytest.raises(TurnedAwayError, match=owner) as refused:
            store.submit(submission(owner))
        assert refused.value.code == "too_many_queued"
    store.set_quota("bob", None)
    assert store.quota("bob") == Quota(queued=1)


def test_an_owner_runs_as_many_jobs_as_the_quota_says(rig: Rig) -> None:
    store = rig.open(quota=Quota(running=1))
    jobs = [store.submit(submission("ann")).job for _ in range(2)]
    assert claimed(store, "w1").id == jobs[0].id
    assert claim(store, "w2") is None
    store.complete(found(store, jobs[0].id).lease, result("a"))
    assert claimed(store, "w2").id == jobs[1].id


def test_a_batch_counts_the_states_of_its_jobs(rig: Rig) -> None:
    store = rig.open()
    wrong = submission(refused=Failure("invalid_prompt", "the prompt is empty"), objects=("picture.png",))
    batch = store.submit_batch([submission(), wrong, submission(), submission()])
    assert batch.counts == {State.QUEUED: 3, State.FAILED: 1}
    store.complete(claimed(store).lease, result("a"))
    store.fail(claimed(store).lease, Failure("out_of_memory", "it is too large"))
    now = store.batch(batch.id)
    assert now is not None
    assert now.counts == {State.QUEUED: 1, State.COMPLETED: 1, State.FAILED: 2}
    assert not now.has_ended
    last = store.cancel_batch(batch.id)
    assert last is not None
    assert last.counts == {State.CANCELLED: 1, State.COMPLETED: 1, State.FAILED: 2}
    assert last.has_ended
    assert store.removable() == ["picture.png"]
    assert broken_rules(store) == []


def test_a_batch_is_added_whole_or_not_at_all(rig: Rig) -> None:
    store = rig.open(most_queued=3)
    store.submit(submission())
    with pytest.raises(TurnedAwayError, match="3 more do not fit"):
        store.submit_batch([submission()] * 3)
    assert store.census().states == {State.QUEUED: 1}
    with pytest.raises(TurnedAwayError, match="no line"):
        store.submit_batch([])
    batch = store.submit_batch([submission()] * 2, "batch_1")
    assert store.submit_batch([submission()] * 2, "batch_1") == batch
    assert store.census().states == {State.QUEUED: 3}
    with pytest.raises(TurnedAwayError, match="somebody else's"):
        store.submit_batch([submission("bob")], "batch_1")


def test_cancelling_a_batch_reaches_all_of_it_and_nothing_else(rig: Rig) -> None:
    store = rig.open()
    alone = store.submit(submission("bob")).job
    batch = store.submit_batch([submission(objects=("picture.png",))] * 3)
    running = claimed(store)
    store.cancel_batch(batch.id)
    assert found(store, alone.id).state == State.QUEUED
    assert found(store, running.id).cancel_requested
    assert store.removable() == []
    assert store.stopped(running.lease)
    assert store.removable() == ["picture.png"]
    assert store.cancel_batch("batch_0") is None
    assert broken_rules(store) == []


@pytest.mark.parametrize("priority", [-11, 11])
def test_a_priority_is_bounded(priority: int) -> None:
    with pytest.raises(RequestError, match="from -10 to 10"):
        submission(priority=priority)


def test_a_queued_job_is_cancelled_at_once(rig: Rig) -> None:
    store = rig.open()
    job = store.submit(submission(objects=("picture.png",))).job
    cancelled = store.cancel(job.id)
    assert cancelled is not None
    assert (cancelled.state, cancelled.completed_at) == (State.CANCELLED, rig.clock.seconds)
    assert claim(store) is None
    assert store.removable() == ["picture.png"]
    assert store.cancel("video_0") is None


def test_a_running_job_is_cancelled_by_its_worker(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission())
    job = claimed(store)
    assert not store.stopped(job.lease)
    assert not store.heartbeat(job.lease).cancel_requested
    for _ in range(2):
        cancelled = store.cancel(job.id)
        assert cancelled is not None
        assert (cancelled.state, cancelled.cancel_requested) == (State.IN_PROGRESS, True)
    assert store.heartbeat(job.lease).cancel_requested
    assert store.stopped(job.lease)
    assert found(store, job.id).state == State.CANCELLED
    assert kinds(store, job.id) == ["queued", "started", "cancel_requested", "cancelled"]


def test_a_job_to_be_cancelled_does_not_run_again_when_its_worker_dies(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission())
    job = claimed(store)
    store.cancel(job.id)
    store.release(["w1"], counts=True)
    assert found(store, job.id).state == State.CANCELLED


def test_a_job_that_has_ended_stays_as_it_is(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission())
    job = claimed(store)
    store.complete(job.lease, result("a"))
    before = found(store, job.id)
    assert store.cancel(job.id) == before


def test_only_a_job_that_has_ended_is_deleted(rig: Rig) -> None:
    store = rig.open()
    mark = Idempotency.of("k", b"body")
    store.submit(submission(objects=("picture.png",), idempotency=mark))
    job = claimed(store)
    with pytest.raises(TurnedAwayError, match="cancel it before") as refused:
        store.delete(job.id)
    assert refused.value.code == "job_active"
    store.complete(job.lease, result("a"))
    assert store.delete(job.id)
    assert store.get(job.id) is None
    assert store.events(job.id) == []
    assert store.removable() == ["a.mp4", "picture.png"]
    assert not store.delete(job.id)
    assert store.submit(submission(idempotency=mark)).is_new


def test_an_object_of_two_jobs_stays_until_both_have_ended(rig: Rig) -> None:
    store = rig.open()
    jobs = [store.submit(submission(objects=("picture.png",))).job for _ in range(2)]
    store.cancel(jobs[0].id)
    assert store.removable() == []
    store.cancel(jobs[1].id)
    assert store.removable() == ["picture.png"]
    with pytest.raises(TurnedAwayError, match=r"picture\.png has expired") as refused:
        store.submit(submission(objects=("picture.png",)))
    assert refused.value.code == "object_gone"
