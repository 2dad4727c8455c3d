"""What time asks for: results, events, jobs and keys that expire."""

import pytest

from tests.runtime.service.store.rig import Rig, broken_rules, claimed, found, kinds, result, submission
from wanforge.runtime.service.job import Failure, State
from wanforge.runtime.service.store import sweeping
from wanforge.runtime.service.store.base import LARGEST_STEP, SETTLING, Offer
from wanforge.runtime.service.store.sql_store import SqlStore

HOURS = 6 * 3600.0
PAUSE = LARGEST_STEP
RULES = {"result_seconds": 1000.0, "event_seconds": 2000.0, "record_seconds": 3000.0}


def completed(store: SqlStore, name: str = "a") -> str:
    store.submit(submission(objects=(f"{name}.png",)))
    job = claimed(store)
    store.complete(job.lease, result(name))
    return job.id


def test_a_result_expires_when_its_time_has_come(rig: Rig) -> None:
    store = rig.open(**RULES)
    rig.let_run(store, SETTLING, PAUSE)
    job = completed(store)
    assert rig.let_run(store, 990, PAUSE) == []
    assert store.removable() == []
    assert rig.let_run(store, 10, PAUSE) == [job]
    expired = found(store, job)
    assert (expired.state, expired.result) == (State.EXPIRED, None)
    assert kinds(store, job)[-1] == "expired"
    assert store.removable() == ["a.mp4", "a.png"]
    assert broken_rules(store) == []


def test_a_removable_object_is_named_until_it_is_gone(rig: Rig) -> None:
    store = rig.open()
    completed(store)
    store.delete(completed(store, "b"))
    assert rig.open().removable() == ["b.mp4", "b.png"]
    assert rig.open().removable(limit=1) == ["b.mp4"]
    store.removed(["b.mp4"])
    store.removed([])
    assert store.removable() == ["b.png"]
    assert store.known(["a.mp4", "a.png", "b.mp4", "b.png", "orphan.mp4"]) == {"a.mp4", "a.png", "b.png"}
    assert store.known([f"{number}.mp4" for number in range(1200)]) == set()


@pytest.mark.parametrize("jump", [HOURS, -HOURS])
def test_a_clock_that_is_set_right_again_expires_nothing(rig: Rig, jump: float) -> None:
    store = rig.open(**RULES)
    rig.let_run(store, SETTLING, PAUSE)
    job = completed(store)
    rig.clock.seconds += jump
    assert rig.let_run(store, SETTLING - 100, PAUSE) == []
    rig.clock.seconds -= jump
    assert rig.let_run(store, 300, PAUSE) == []
    assert rig.let_run(store, SETTLING, PAUSE) == [job]


def test_a_service_that_was_off_for_long_expires_what_is_due(rig: Rig) -> None:
    store = rig.open(**RULES)
    job = completed(store)
    rig.clock.seconds += HOURS
    assert rig.let_run(store, SETTLING, PAUSE) == []
    assert rig.let_run(store, 10, PAUSE) == [job]


def test_events_and_jobs_are_forgotten_in_the_end(rig: Rig) -> None:
    store = rig.open(**RULES)
    rig.let_run(store, SETTLING, PAUSE)
    batch = store.submit_batch([submission()])
    store.cancel_batch(batch.id)
    expiring = completed(store)
    store.submit(submission())
    failing = claimed(store)
    store.fail(failing.lease, Failure("out_of_memory", "it is too large"))
    waiting = store.submit(submission(bundle="other")).job.id
    rig.let_run(store, 2500, PAUSE)
    assert kinds(store, failing.id) == []
    assert kinds(store, waiting) == ["queued"]
    assert [found(store, job).state for job in (expiring, failing.id)] == [State.EXPIRED, State.FAILED]
    rig.let_run(store, 510, PAUSE)
    assert [store.get(job) for job in (expiring, failing.id)] == [None, None]
    assert store.batch(batch.id) is None
    assert found(store, waiting).state == State.QUEUED
    store.removed(store.removable())
    assert store.known(["a.mp4", "a.png"]) == set()


def serve(rig: Rig, store: SqlStore, seconds: float, *bundles: str) -> list[str]:
    """Let a service with some bundles run for a time, and return the jobs that have failed meanwhile."""
    failed = []
    for _ in range(int(seconds / PAUSE)):
        failed += store.fail_unserved(bundles, 100.0)
        rig.let_run(store, PAUSE, PAUSE)
    return failed


def test_queued_jobs_of_a_bundle_that_nobody_serves_any_more_fail(rig: Rig) -> None:
    store = rig.open()
    gone, kept = (store.submit(submission(bundle=bundle)).job.id for bundle in ("old", "new"))
    assert serve(rig, store, 50, "old", "new") == []
    assert serve(rig, store, 80, "new") == []
    assert serve(rig, store, 50, "new") == [gone]
    failed = found(store, gone)
    assert failed.error is not None
    assert (failed.state, failed.error.code) == (State.FAILED, "bundle_gone")
    assert found(store, kept).state is State.QUEUED
    assert broken_rules(store) == []


def test_a_bundle_that_another_machine_serves_is_not_gone(rig: Rig) -> None:
    store, other = rig.open(), rig.open()
    job = store.submit(submission(bundle="other")).job.id
    for _ in range(30):
        assert serve(rig, store, PAUSE, "mine") == []
        assert serve(rig, other, PAUSE, "other") == []
    assert found(store, job).state is State.QUEUED


def test_a_job_waits_for_its_bundle_as_long_as_for_one_that_was_served(rig: Rig) -> None:
    store = rig.open()
    serve(rig, store, 200, "other")
    job = store.submit(submission(bundle="new")).job.id
    assert serve(rig, store, 100, "other") == []
    assert serve(rig, store, 20, "new") == []
    assert claimed_bundle(store, "new") == job


def claimed_bundle(store: SqlStore, bundle: str) -> str | None:
    job = store.claim(Offer("w1", (bundle,)))
    return None if job is None else job.id


def test_old_events_are_forgotten_some_at_a_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "MOST_EVENTS", 2)
    store = rig.open(**RULES)
    rig.let_run(store, SETTLING, PAUSE)
    store.submit(submission())
    job = claimed(store)
    store.fail(job.lease, Failure("out_of_memory", "it is too large"))
    rig.clock.seconds += RULES["event_seconds"]
    store.sweep()  # the clock has jumped, so nothing expires yet
    rig.let_run(store, SETTLING - PAUSE, PAUSE)
    left = []
    while events := kinds(store, job.id):
        left.append(events)
        rig.let_run(store, PAUSE, PAUSE)
    assert left == [["queued", "started", "failed"], ["failed"]]
