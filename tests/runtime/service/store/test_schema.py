"""Stores of other versions."""

import sqlite3
from pathlib import Path

import pytest

from tests.runtime.service.store.rig import Rig, broken_rules, claimed, found, submission
from wanforge.runtime.service.job import Idempotency, Result, State
from wanforge.runtime.service.store.base import DurationKey, StoreError
from wanforge.runtime.service.store.databases import schema

DONE = Result(objects={"video": "done.mp4"}, backend="trt", details={"seed": 7})
VERSION_1 = Path(__file__).parents[3] / "data" / "job_store_v1.sql"


def run_script(rig: Rig, script: str) -> None:
    """Run statements as whoever wrote a store would have."""
    if "://" in rig.place:
        import psycopg

        with psycopg.connect(rig.place, autocommit=True) as connection:
            connection.execute(script.encode())
        return
    database = sqlite3.connect(rig.place)
    database.executescript(script)
    database.close()


def version(rig: Rig) -> int:
    with rig.open().database.read() as transaction:
        return transaction.number("SELECT version AS n FROM schema_version")


def test_a_store_of_version_1_is_migrated_with_its_jobs(rig: Rig) -> None:
    run_script(rig, VERSION_1.read_text())
    store = rig.open()
    assert version(rig) == len(schema.STEPS)
    done = found(store, "video_done")
    assert (done.state, done.result) == (State.COMPLETED, DONE)
    assert store.durations(DurationKey("bundle-1", "832x480x81", 4)) == [12.5]
    assert store.known(["picture.png", "done.mp4"]) == {"picture.png", "done.mp4"}
    assert not store.submit(submission(idempotency=Idempotency("k", "digest"))).is_new
    assert [claimed(store).id for _ in range(2)] == ["video_urgent", "video_first"]
    assert store.submit(submission()).is_new
    assert broken_rules(store) == []


def test_a_store_of_a_newer_version_is_left_alone(rig: Rig) -> None:
    rig.open().submit(submission())
    run_script(rig, "UPDATE schema_version SET version = 99")
    with pytest.raises(StoreError, match="has schema version 99, and this wanforge knows versions up to 4") as refused:
        rig.open()
    assert refused.value.code == "store_newer"
    run_script(rig, "UPDATE schema_version SET version = 4")
    assert rig.open().census().states == {State.QUEUED: 1}


def test_a_migration_that_fails_changes_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    run_script(rig, VERSION_1.read_text())
    with monkeypatch.context() as patch:
        patch.setattr(schema, "STEPS", (*schema.STEPS, "CREATE TABLE more (n BIGINT); SELECT n FROM nowhere"))
        with pytest.raises(Exception, match="nowhere"):
            rig.open()
    assert version(rig) == len(schema.STEPS)
    run_script(rig, "CREATE TABLE more (n BIGINT)")


def test_a_process_goes_on_while_a_newer_one_adds_a_column(rig: Rig) -> None:
    store = rig.open()
    job = store.submit(submission()).job
    for _ in range(10):  # often enough for a library to keep the query
        found(store, job.id)
    run_script(rig, "ALTER TABLE jobs ADD COLUMN more BIGINT")
    assert found(store, job.id) == job
    assert store.complete(claimed(store).lease, DONE)
