"""Heartbeats go on whatever happens to the job store."""

from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.processes import wait_until
from tests.runtime.service.store.rig import claimed, submission
from wanforge.runtime.service.store.base import News, StoreError
from wanforge.runtime.service.store.sql_store import SqlStore, open_store
from wanforge.runtime.service.workers.heart import Attempt, Heart, Stop
from wanforge.runtime.service.workers.settings import WorkTimes

QUICK = WorkTimes(heartbeat=0.05, progress=0.02)


def failing_at_first(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the first call of `SqlStore.news` fail."""
    news, has_failed = SqlStore.news, Event()

    def fail(store: SqlStore, *, of_progress: bool = True) -> News:
        if not has_failed.is_set():
            has_failed.set()
            raise error
        return news(store, of_progress=of_progress)

    monkeypatch.setattr(SqlStore, "news", fail)


@pytest.mark.parametrize("error", [StoreError("store_unreachable", "the connection broke"), OSError("no descriptors")])
def test_heartbeats_outlive_news_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store: Any = open_store(tmp_path / "jobs.sqlite")
    store.submit(submission())
    attempt = Attempt(claimed(store), lambda: None, tmp_path)
    failing_at_first(monkeypatch, error)
    heart = Heart(store, QUICK)
    heart.add(attempt)
    heart.start()
    store.cancel(attempt.job.id)
    wait_until(lambda: attempt.stop is Stop.CANCELLED, 5)
    heart.stop()
