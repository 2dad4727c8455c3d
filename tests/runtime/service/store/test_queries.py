"""What clients and operators read."""

import threading

import pytest

from tests.runtime.service.store.rig import Rig, claim, claimed, kinds, result, submission
from wanforge.runtime.service.job import State
from wanforge.runtime.service.store.base import JobFilter, TurnedAwayError


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_list_every_job_once(rig: Rig, order: str) -> None:
    store = rig.open()
    ids = [store.submit(submission("ann" if place % 3 else "bob")).job.id for place in range(9)]
    listed: list[str] = []
    pages = 0
    has_more = True
    while has_more:
        after = listed[-1] if listed else None
        page = store.jobs(JobFilter(owner="ann", after=after, limit=2, order=order))  # type: ignore[arg-type]
        listed += [job.id for job in page.jobs]
        pages, has_more = pages + 1, page.has_more
    expected = [id for place, id in enumerate(ids) if place % 3]
    assert listed == (expected if order == "asc" else expected[::-1])
    assert pages == 3


def test_jobs_are_listed_by_state_and_batch(rig: Rig) -> None:
    store = rig.open()
    alone = store.submit(submission()).job
    batch = store.submit_batch([submission()] * 3)
    store.cancel(alone.id)
    assert [job.id for job in store.jobs(JobFilter(states=(State.CANCELLED, State.FAILED))).jobs] == [alone.id]
    assert [job.line for job in store.jobs(JobFilter(batch=batch.id)).jobs] == [2, 1, 0]
    with pytest.raises(TurnedAwayError, match="video_0") as refused:
        store.jobs(JobFilter(after="video_0"))
    assert refused.value.code == "unknown_job"


def test_events_are_read_from_a_sequence_on(rig: Rig) -> None:
    store = rig.open()
    store.submit(submission())
    job = claimed(store)
    store.heartbeat(job.lease, "denoise", 10)
    store.complete(job.lease, result("a"))
    assert kinds(store, job.id) == ["queued", "started", "progress", "completed"]
    reopened = rig.open()
    assert [event.sequence for event in reopened.events(job.id, after=2)] == [3, 4]
    assert [event.sequence for event in reopened.events(job.id, after=1, limit=1)] == [2]
    assert reopened.events(job.id, after=4) == []


def test_news_comes_with_each_change_and_only_then(rig: Rig) -> None:
    store, other = rig.open(), rig.open()
    news = store.news()
    assert not news.wait(0.01)
    other.submit(submission())
    assert news.wait(2.0)
    assert not news.wait(0.01)
    claimed(store)
    assert news.wait(2.0)
    news.close()


def test_waiting_ends_as_soon_as_there_is_news(rig: Rig) -> None:
    store = rig.open()
    news = store.news()
    timer = threading.Timer(0.1, lambda: store.submit(submission()))
    timer.start()
    assert news.wait(20.0)
    timer.join()
    news.close()


def test_a_worker_that_finds_nothing_wakes_nobody(rig: Rig) -> None:
    store, other = rig.open(), rig.open()
    store.submit(submission(bundle="other"))
    news = store.news()
    for _ in range(5):
        rig.clock.seconds += 0.1
        assert claim(other) is None
    assert not news.wait(0.01)
    news.close()


def test_the_census_counts_jobs(rig: Rig) -> None:
    store = rig.open()
    assert store.census().oldest_queued_seconds == 0
    for owner in ("ann", "ann", "bob"):
        store.submit(submission(owner))
    claimed(store)
    rig.let_run(store, 20)
    census = store.census()
    assert census.states == {State.QUEUED: 2, State.IN_PROGRESS: 1}
    assert census.owners == {"ann": (1, 1), "bob": (1, 0)}
    assert census.oldest_queued_seconds == 20


@pytest.mark.parametrize("text", ["video_\0", "video_\udcff"])
def test_an_id_that_is_no_text_is_refused(rig: Rig, text: str) -> None:
    with pytest.raises(TurnedAwayError, match="no text") as refused:
        rig.open().get(text)
    assert refused.value.code == "bad_text"
