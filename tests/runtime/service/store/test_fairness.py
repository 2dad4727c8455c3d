"""The order in which jobs start, as properties of any queue."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.service.store.rig import BUNDLE, Rig, claim, claimed, found, quick_folder, result, submission
from wanforge.runtime.service.job import HIGHEST_PRIORITY, LOWEST_PRIORITY, Job
from wanforge.runtime.service.store.base import LEFT_SECONDS, MOST_PASSES, BundleShape, Policy
from wanforge.runtime.service.store.sql_store import SqlStore

AGEING = Policy().ageing_seconds
OWNERS = st.sampled_from(["ann", "bob", "cyd"])
PRIORITIES = st.integers(LOWEST_PRIORITY, HIGHEST_PRIORITY)
SHAPES = st.sampled_from(["small", "large"])


@contextmanager
def fresh_rig() -> Iterator[Rig]:
    """A rig for one example."""
    with quick_folder() as folder:
        rig = Rig(str(folder / "jobs.sqlite"))
        yield rig
        rig.close()


def started(store: SqlStore, *, prefer_warm: bool) -> list[Job]:
    """All jobs in the order in which one worker makes them."""
    order: list[Job] = []
    warm: tuple[BundleShape, ...] = ()
    while job := claim(store, "w1", *warm):
        store.complete(job.lease, result(job.id))
        order.append(job)
        warm = ((BUNDLE, job.shape),) if prefer_warm else ()
    return order


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(OWNERS, PRIORITIES, SHAPES), min_size=1, max_size=20))
def test_no_job_waits_for_longer_than_the_bound(queue: list[tuple[str, int, str]]) -> None:
    with fresh_rig() as rig:
        store = rig.open()
        for owner, priority, shape in queue:
            store.submit(submission(owner, priority=priority, shape=shape))
        order = started(store, prefer_warm=True)
        assert len(order) == len(queue)
        owners = len({owner for owner, _, _ in queue})
        for place, job in enumerate(order):
            ahead = [
                other
                for other in order
                if other.owner == job.owner
                and (-other.priority, other.created_at) <= (-job.priority, job.created_at)
                and other.id != job.id
            ]
            assert place < (1 + MOST_PASSES) * owners * (len(ahead) + 1)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(PRIORITIES, st.floats(0, 400)), min_size=2, max_size=12))
def test_a_level_of_priority_is_worth_a_minute_of_waiting(queue: list[tuple[int, float]]) -> None:
    with fresh_rig() as rig:
        store = rig.open()
        times: dict[str, float] = {}
        begin = rig.clock.seconds
        for priority, pause in queue:
            rig.let_run(store, pause)
            job = store.submit(submission(priority=priority)).job
            times[job.id] = rig.clock.seconds - begin
        order = started(store, prefer_warm=False)
        assert [job.id for job in order] == sorted(
            times, key=lambda id: (times[id] - AGEING * found(store, id).priority, times[id])
        )


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(OWNERS, min_size=6, max_size=20), st.lists(st.integers(-2, 5), min_size=30, max_size=30))
def test_the_owner_with_the_fewest_jobs_running_is_next(queue: list[str], ends: list[int]) -> None:
    """Each number is a claim if it is negative, and otherwise the place of a running job that ends."""
    with fresh_rig() as rig:
        store = rig.open()
        waiting, running = Counter(queue), Counter[str]()
        for owner in queue:
            store.submit(submission(owner))
        held: list[Job] = []
        for end in ends:
            if end >= 0 and held:
                job = held.pop(end % len(held))
                store.complete(job.lease, result(job.id))
                running[job.owner] -= 1
            elif next_job := claim(store):
                fewest = min(running[owner] for owner in waiting if waiting[owner])
                assert running[next_job.owner] == fewest
                waiting[next_job.owner] -= 1
                running[next_job.owner] += 1
                held.append(next_job)


def test_owners_take_turns(rig: Rig) -> None:
    store = rig.open()
    for owner in ("ann", "ann", "ann", "bob", "bob", "cyd"):
        store.submit(submission(owner))
    assert [job.owner for job in started(store, prefer_warm=False)] == ["ann", "bob", "cyd", "ann", "bob", "ann"]


def test_an_owner_whose_jobs_have_ended_is_next(rig: Rig) -> None:
    store = rig.open()
    for owner in ("ann", "bob", "ann", "bob"):
        store.submit(submission(owner))
    claimed(store)
    job = claimed(store)
    store.complete(job.lease, result(job.id))
    assert claimed(store).owner == job.owner == "bob"


def test_a_flood_of_urgent_jobs_holds_another_up_for_as_long_as_stated(rig: Rig) -> None:
    store = rig.open()
    patient = store.submit(submission(priority=-1)).job
    begin = rig.clock.seconds
    while True:
        store.submit(submission(priority=1))
        job = claimed(store)
        if job.id == patient.id:
            break
        rig.let_run(store, 10)
        store.complete(job.lease, result(job.id)) or pytest.fail("the lease was lost")
    assert rig.clock.seconds - begin == 2 * AGEING


def test_a_warm_worker_passes_a_job_over_three_times(rig: Rig) -> None:
    store = rig.open()
    cold = store.submit(submission(shape="large")).job
    urgent = store.submit(submission(shape="large", priority=1)).job
    warm = [store.submit(submission(shape="small")).job for _ in range(5)]
    taken = [claimed(store, "w1", (BUNDLE, "small")).id for _ in range(7)]
    assert taken == [urgent.id, *(job.id for job in warm[:3]), cold.id, *(job.id for job in warm[3:])]


def test_a_worker_that_is_warm_for_several_shapes_takes_what_came_first_of_them(rig: Rig) -> None:
    store = rig.open()
    shapes = ("large", "small", "wide", "small")
    jobs = [store.submit(submission(shape=shape)).job.id for shape in shapes]
    taken = [claimed(store, "w1", (BUNDLE, "wide"), (BUNDLE, "small")).id for _ in shapes]
    assert taken == [*jobs[1:], jobs[0]]


def test_a_new_job_is_left_for_a_moment_to_an_idle_worker_that_is_warm_for_it(rig: Rig) -> None:
    store, left = rig.open(), ((BUNDLE, "small"),)
    job = store.submit(submission(shape="small")).job.id
    assert claim(store, left=left) is None
    other = store.submit(submission(shape="large")).job.id
    taken = claim(store, left=left)
    assert taken is not None
    assert taken.id == other
    rig.let_run(store, 2 * LEFT_SECONDS, LEFT_SECONDS)
    taken = claim(store, left=left)
    assert taken is not None
    assert taken.id == job


def test_the_position_counts_the_jobs_that_start_before(rig: Rig) -> None:
    store = rig.open()
    jobs = [store.submit(submission(owner)).job for owner in ("ann", "ann", "ann", "bob", "bob", "cyd")]
    jobs.append(store.submit(submission("cyd", priority=1)).job)
    positions = {job.id: store.position(job.id) for job in jobs}
    assert list(positions.values()) == [2, 5, 6, 2, 5, 5, 2]
    assert store.positions() == positions
    for place, job in enumerate(started(store, prefer_warm=False)):
        position = positions[job.id]
        assert position is not None
        assert place <= position <= place + 2
        assert store.position(job.id) is None
