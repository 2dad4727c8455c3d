"""What only Postgres does: connections that break, and locks that others hold."""

import sys
from contextlib import closing
from typing import Any

import pytest

from tests.runtime.service.store.conftest import new_schema
from tests.runtime.service.store.rig import BUNDLE, claimed, result, submission
from wanforge.errors import ResourceError
from wanforge.runtime.service.job import State
from wanforge.runtime.service.store.base import Offer, Policy, StoreError
from wanforge.runtime.service.store.databases.postgres import LOCK, NETWORK, Postgres, translated
from wanforge.runtime.service.store.sql_store import SqlStore, open_store


def end_all_others(url: str) -> None:
    """Let the server end every connection but this one."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND backend_type = 'client backend'"
        )


@pytest.mark.slow
def test_connections_that_broke_are_made_again(postgres_url: str) -> None:
    store = open_store(new_schema(postgres_url))
    news = store.news()
    store.submit(submission())
    assert news.wait(5.0)
    end_all_others(postgres_url)
    assert store.submit(submission()).is_new
    assert news.wait(5.0)
    store.submit(submission())
    assert news.wait(5.0)
    assert store.census().states == {State.QUEUED: 3}
    news.close()
    store.close()


@pytest.mark.slow
def test_a_change_whose_connection_breaks_can_be_repeated(postgres_url: str) -> None:
    store = open_store(new_schema(postgres_url))
    assert isinstance(store, SqlStore)
    store.submit(submission())

    def change() -> None:
        with store.database.write() as transaction:
            transaction.run("UPDATE clock SET claims = 99")
            end_all_others(postgres_url)

    with pytest.raises(StoreError, match="cannot be reached") as lost:
        change()
    assert lost.value.code == "store_unreachable"
    job = claimed(store)
    assert store.complete(job.lease, result("a"))
    store.close()


@pytest.mark.slow
def test_a_locked_store_in_postgres_says_so(postgres_url: str) -> None:
    import psycopg

    store = SqlStore(Postgres(new_schema(postgres_url), busy_seconds=0.1), Policy())
    with psycopg.connect(postgres_url) as other:
        other.execute(f"SELECT pg_advisory_xact_lock({LOCK})".encode())
        with pytest.raises(StoreError, match="locked by another process") as refused:
            store.submit(submission())
        assert refused.value.code == "store_busy"
        assert store.census().states == {}
    assert store.submit(submission()).is_new
    store.close()


@pytest.mark.slow
def test_a_server_that_is_not_there_is_named_without_the_password(postgres_url: str) -> None:
    del postgres_url
    with pytest.raises(StoreError, match="'jobs' at /nowhere cannot be reached") as refused:
        open_store("postgresql://user:secret@/jobs?host=/nowhere")
    assert refused.value.code == "store_unreachable"
    assert "secret" not in str(refused.value)


@pytest.mark.slow
def test_nobody_waits_long_for_a_host_that_has_vanished(postgres_url: str) -> None:
    def parameters(url: str) -> dict[str, str]:
        with closing(Postgres(url)) as database, database.connect() as connection:
            return dict(connection.info.get_parameters())

    url = new_schema(postgres_url)
    assert parameters(url).items() >= NETWORK.items()
    assert (
        parameters(f"{url}&tcp_user_timeout=5000&connect_timeout=3").items()
        >= {
            **NETWORK,
            "tcp_user_timeout": "5000",
            "connect_timeout": "3",
        }.items()
    )


@pytest.mark.slow
def test_the_clock_is_that_of_the_server(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 5.0)
    store = open_store(new_schema(postgres_url))
    assert store.submit(submission()).job.created_at > 1e9
    store.close()


def test_a_missing_psycopg_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from wanforge.runtime.service.store.databases import postgres

    postgres.psycopg.cache_clear()
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ResourceError, match=r"needs psycopg; run: .* -m pip install"):
        open_store("postgresql://localhost/jobs")
    postgres.psycopg.cache_clear()


def test_values_are_named_as_psycopg_does_and_casts_stay() -> None:
    named: Any = translated("SELECT now()::text WHERE id = :job AND place < :place_2")
    assert named == "SELECT now()::text WHERE id = %(job)s AND place < %(place_2)s"


@pytest.mark.slow
def test_progress_wakes_only_those_who_ask_for_it(postgres_url: str) -> None:
    with closing(open_store(new_schema(postgres_url))) as store:
        store.submit(submission())
        job = store.claim(Offer("w1", (BUNDLE,)))
        assert job is not None
        with closing(store.news()) as every, closing(store.news(of_progress=False)) as some:
            store.heartbeat(job.lease, "step 1", 10)
            assert every.wait(10)
            assert not some.wait(0.3)
            store.heartbeat(job.lease, "step 2", 20)
            store.submit(submission())
            assert some.wait(10)
            assert not some.wait(0)
