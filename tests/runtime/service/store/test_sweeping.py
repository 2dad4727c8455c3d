"""What time asks for: results, events, jobs and keys that expire."""

import pytest

from tests.runtime.service.store.rig import Rig, broken_rules, claimed, found, kinds, result, submission
from wanforge.runtime.service.job import Failure, State
from wanforge.runtime.service.store.base import LARGEST_STEP, SETTLING
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
