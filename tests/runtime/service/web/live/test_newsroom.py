"""One reader serves all who follow jobs, and reads nothing that nobody follows."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.service.store.rig import claimed, submission
from tests.runtime.service.workers.test_heart import failing_at_first
from wanforge.runtime.service.job import JobEvent
from wanforge.runtime.service.store.base import StoreError
from wanforge.runtime.service.store.sql_store import open_store
from wanforge.runtime.service.web.live import newsroom as newsroom_module
from wanforge.runtime.service.web.live.newsroom import Feed, Newsroom


@pytest.fixture
def newsroom(tmp_path: Path) -> Newsroom:
    return Newsroom(open_store(tmp_path / "jobs.sqlite"))


async def next_of(feed: Feed) -> list[JobEvent] | None:
    return await feed.next(5)


def test_events_are_read_once_for_all_who_follow(newsroom: Newsroom, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = newsroom.store
    followed, other = (store.submit(submission()).job.id for _ in range(2))
    read, events = list[tuple[str, int]](), type(store).events

    def noted(self: Any, job: str, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        read.append((job, after))
        return events(self, job, after, limit)

    monkeypatch.setattr(type(store), "events", noted)

    async def follow() -> list[list[JobEvent] | None]:
        newsroom.open()
        with newsroom.following(followed, 1) as first, newsroom.following(followed, 1) as second:
            store.cancel(other)
            store.cancel(followed)
            found = await asyncio.gather(next_of(first), next_of(second))
        newsroom.close()
        return found

    first, second = asyncio.run(follow())
    assert first is not None
    assert [event.kind for event in first] == ["cancelled"]
    assert first == second
    assert {job for job, _ in read} == {followed}
    assert [after for _, after in read].count(1) == 1


def test_a_job_that_is_deleted_ends_its_feed(newsroom: Newsroom) -> None:
    store = newsroom.store
    job = store.submit(submission()).job.id
    store.cancel(job)

    async def follow() -> list[JobEvent] | None:
        newsroom.open()
        with newsroom.following(job, 2) as feed:
            store.delete(job)
            found = await next_of(feed)
        newsroom.close()
        return found

    assert asyncio.run(follow()) is None


def test_a_feed_is_quiet_until_something_happens_to_its_job(newsroom: Newsroom) -> None:
    store: Any = newsroom.store
    job = store.submit(submission()).job.id

    async def follow() -> list[JobEvent] | None:
        newsroom.open()
        with newsroom.following(job, 1) as feed:
            store.submit(submission())
            found = await feed.next(0.2)
            claimed(store)
        newsroom.close()
        return found

    assert asyncio.run(follow()) == []


def test_who_comes_when_the_server_ends_is_told_so(newsroom: Newsroom) -> None:
    async def follow() -> list[JobEvent] | None:
        newsroom.open()
        newsroom.close()
        with newsroom.following("video_none", 0) as feed:
            return await next_of(feed)

    assert asyncio.run(follow()) is None


def test_the_news_go_on_after_they_could_not_be_opened(newsroom: Newsroom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newsroom_module, "LOOK_SECONDS", 0.01)
    failing_at_first(monkeypatch, StoreError("store_unreachable", "the connection broke"))
    store = newsroom.store
    job = store.submit(submission()).job.id

    async def follow() -> list[JobEvent] | None:
        newsroom.open()
        with newsroom.following(job, 1) as feed:
            store.cancel(job)
            found = await next_of(feed)
        newsroom.close()
        return found

    assert [event.kind for event in asyncio.run(follow()) or ()] == ["cancelled"]


def test_nothing_is_missed_where_reading_the_events_fails(newsroom: Newsroom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newsroom_module, "LOOK_SECONDS", 0.01)
    store: Any = newsroom.store
    jobs = [store.submit(submission()).job.id for _ in range(2)]
    read, events = list[str](), type(store).events

    def fail_once(self: Any, job: str, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        read.append(job)
        if len(read) == 3:  # the first job has been read to its end
            raise StoreError("store_busy", "the job store is locked")
        return events(self, job, after, limit)

    async def follow() -> list[list[JobEvent] | None]:
        with newsroom.following(jobs[0], 1) as first, newsroom.following(jobs[1], 1) as second:
            for job in jobs:
                store.cancel(job)
            monkeypatch.setattr(type(store), "events", fail_once)
            newsroom.open()
            found = await asyncio.gather(next_of(first), next_of(second))
        newsroom.close()
        return found

    assert [[event.kind for event in each or ()] for each in asyncio.run(follow())] == [["cancelled"], ["cancelled"]]
