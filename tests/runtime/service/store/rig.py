"""Stores for tests, with a clock that stands still, and what has to be true of any store."""

import json
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanforge.runtime.service.job import Job, Result, Submission
from wanforge.runtime.service.store.base import BundleShape, Offer, Policy
from wanforge.runtime.service.store.databases.sqlite import Sqlite
from wanforge.runtime.service.store.sql_store import SqlStore, open_store

BUNDLE, SHAPE = "bundle-1", "832x480x81"
HEARTBEAT = 5.0


@dataclass
class StillClock:
    """A clock that moves only when it is told to."""

    seconds: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.seconds


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory, where syncing is quick, if there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@dataclass
class Rig:
    """A store of its own for a test, at a place where other processes find it."""

    place: str
    clock: StillClock = field(default_factory=StillClock)
    opened: list[SqlStore] = field(default_factory=list)

    def open(self, **rules: Any) -> SqlStore:
        store = open_store(self.place, Policy(**rules), self.clock)
        assert isinstance(store, SqlStore)
        self.opened.append(store)
        return store

    def close(self) -> None:
        for store in self.opened:
            store.close()

    def let_run(self, store: SqlStore, seconds: float, pause: float = HEARTBEAT) -> list[str]:
        """Let the service run for a time, and return the ids of the jobs that changed."""
        changed = []
        for _ in range(int(seconds / pause)):
            self.clock.seconds += pause
            changed += store.sweep()
        return changed


def submission(owner: str = "ann", **fields: Any) -> Submission:
    given: dict[str, Any] = {"bundle": BUNDLE, "shape": SHAPE, "steps": 4, "request": {"prompt": "a red circle"}}
    return Submission(owner=owner, **(given | fields))


def result(name: str, backend: str = "torch") -> Result:
    return Result(objects={"video": f"{name}.mp4"}, backend=backend)


def claim(store: SqlStore, worker: str = "w1", *warm: BundleShape, left: tuple[BundleShape, ...] = ()) -> Job | None:
    return store.claim(Offer(worker, (BUNDLE,), warm, left))


def claimed(store: SqlStore, worker: str = "w1", *warm: BundleShape) -> Job:
    job = claim(store, worker, *warm)
    assert job is not None
    return job


def found(store: SqlStore, job: str) -> Job:
    present = store.get(job)
    assert present is not None
    return present


def kinds(store: SqlStore, job: str) -> list[str]:
    return [event.kind for event in store.events(job)]


def broken_rules(store: SqlStore) -> list[str]:
    """What is wrong in a store from which no job was deleted: the rules that some rows break."""
    with store.database.read() as transaction:
        wrong = [
            name
            for name, condition in RULES.items()
            if transaction.rows(f"SELECT 1 AS one FROM jobs WHERE NOT ({condition})")
        ]
        wrong += [name for name, query in COUNTS.items() if transaction.rows(query)]
        for job in transaction.rows("SELECT id, events, state, error FROM jobs"):
            events = transaction.rows("SELECT * FROM events WHERE job = :job ORDER BY sequence", job=job["id"])
            if [event["sequence"] for event in events] != list(range(1, job["events"] + 1)):
                wrong.append(
                    f"{job['id']} has events {[event['sequence'] for event in events]}, not 1 to {job['events']}"
                )
            elif events[-1]["kind"] not in LAST[job["state"]]:
                wrong.append(f"{job['id']} is {job['state']}, and its last event is {events[-1]['kind']}")
            elif job["state"] == "failed" and json.loads(events[-1]["data"])["error"] != json.loads(job["error"]):
                wrong.append(f"{job['id']} failed otherwise than its last event says")
        if isinstance(store.database, Sqlite):
            pages = [row["integrity_check"] for row in transaction.rows("PRAGMA integrity_check")]
            wrong += [said for said in pages if said != "ok"]
    return wrong


RULES = {
    "a running job has a lease": "state <> 'in_progress' OR (lease_until IS NOT NULL AND worker IS NOT NULL)",
    "a queued job has no lease": "state <> 'queued' OR lease_until IS NULL",
    "a running job has an attempt": "state <> 'in_progress' OR attempt > lost",
    "a queued job may still run": "state <> 'queued' OR lost < 2",
    "an ended job has an end": "(state IN ('queued', 'in_progress')) = (completed_at IS NULL)",
    "a completed job has a result": "(state = 'completed') = (result IS NOT NULL)",
    "a completed job expires": "(state IN ('completed', 'expired')) = (expires_at IS NOT NULL)",
    "a failed job has an error": "(state = 'failed') = (error IS NOT NULL)",
    "a job has an owner": "owner IN (SELECT owner FROM owners)",
    "a job's batch exists": "batch IS NULL OR batch IN (SELECT id FROM batches)",
    "numbers are counted": "number < (SELECT jobs FROM clock)",
}
COUNTS = {
    "durations are those of the completed jobs": "SELECT 1 AS one FROM clock WHERE (SELECT count(*) FROM durations) <> "
    "(SELECT count(*) FROM jobs WHERE state IN ('completed', 'expired'))",
    "keys lead to jobs": "SELECT 1 AS one FROM idempotency WHERE job NOT IN (SELECT id FROM jobs)",
    "objects belong to jobs": "SELECT 1 AS one FROM objects WHERE job NOT IN (SELECT id FROM jobs)",
    "removable objects belong to none": "SELECT 1 AS one FROM removals WHERE name IN (SELECT name FROM objects)",
    "events belong to jobs": "SELECT 1 AS one FROM events WHERE job NOT IN (SELECT id FROM jobs)",
    "turns are counted": "SELECT 1 AS one FROM owners WHERE served > (SELECT claims FROM clock)",
    "there is one time": "SELECT n FROM (SELECT count(*) AS n FROM clock) AS counted WHERE n <> 1",
}
LAST = {
    "queued": ("queued", "requeued"),
    "in_progress": ("started", "progress", "cancel_requested"),
    **{state: (state,) for state in ("completed", "failed", "cancelled", "expired")},
}


def postgres_programs() -> Path | None:
    """The folder of ``initdb`` and ``pg_ctl``."""
    folders = [Path(each) for each in os.environ.get("PATH", "").split(os.pathsep)]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((each for each in folders if (each / "initdb").exists() and (each / "pg_ctl").exists()), None)


@contextmanager
def postgres_server(programs: Path) -> Iterator[str]:
    """A server in a temporary folder, which only a Unix socket leads to. Gives the URL of a database.

    Postgres does not run as root, so there it is run as its own user, or as nobody.
    """
    folder = Path(tempfile.mkdtemp(prefix="wanforge-pg-", dir="/tmp"))
    user = next((each.pw_name for each in pwd.getpwall() if each.pw_name in ("postgres", "nobody")), None)
    user = user if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)

    def call(program: str, *arguments: str) -> None:
        command = [programs / program, *arguments]
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    data = str(folder / "data")
    try:
        call("initdb", "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-F -c listen_addresses= -c unix_socket_directories={folder} -c max_connections=40"
        call("pg_ctl", "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
        yield f"postgresql://tests@/postgres?host={folder}"
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)
