"""Jobs as rows of the database, and the one way in which they change."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from wanforge.runtime.service.job import Failure, Job, JobEvent, Lease, Result, State
from wanforge.runtime.service.store.base import Quota
from wanforge.runtime.service.store.databases.database import Row, Transaction, listed

QUEUED, RUNNING = "state = 'queued'", "state = 'in_progress'"
HELD = f"{RUNNING} AND worker = :worker AND attempt = :attempt"
"""The fence of a worker: that the job is still on the attempt that it was given."""
ENDED = "state NOT IN ('queued', 'in_progress')"


MOST_NAMES = 500
"""The number of names in one statement; each database has a limit."""


def new_id(kind: str) -> str:
    """An id that nobody can guess."""
    return f"{kind}_{uuid.uuid4().hex}"


def text_of(value: Any) -> str:
    """A value as JSON."""
    return msgspec.json.encode(value).decode()


def job_of(row: Row) -> Job:
    """A row of ``jobs`` as a record."""
    fields = {name: row[name] for name in Job.__struct_fields__ if name not in PARSED}
    return Job(**fields, **{name: parse(row[name]) for name, parse in PARSED.items()})


def _parsed(kind: Any) -> Any:
    return lambda text: None if text is None else msgspec.json.decode(text, type=kind)


PARSED = {
    "request": _parsed(dict[str, Any]),
    "objects": _parsed(tuple[str, ...]),
    "result": _parsed(Result),
    "error": _parsed(Failure),
    "state": State,
    "cancel_requested": bool,
}
"""The columns that are not stored as they are in the record."""


def event_of(row: Row) -> JobEvent:
    """A row of ``events`` as a record."""
    data = msgspec.json.decode(row["data"])
    return JobEvent(row["job"], row["sequence"], row["created_at"], row["kind"], data)


def find(transaction: Transaction, job: str) -> Job | None:
    """A job by its id."""
    row = transaction.row("SELECT * FROM jobs WHERE id = :job", job=job)
    return job_of(row) if row else None


def quota_of(transaction: Transaction, owner: str, usual: Quota) -> Quota:
    """What an owner may have."""
    row = transaction.row("SELECT quota FROM owners WHERE owner = :owner", owner=owner)
    return msgspec.json.decode(row["quota"], type=Quota) if row and row["quota"] else usual


def set_quota(transaction: Transaction, owner: str, quota: Quota | None) -> None:
    """Set what an owner may have."""
    transaction.run(
        "INSERT INTO owners (owner, quota) VALUES (:owner, :quota) "
        "ON CONFLICT (owner) DO UPDATE SET quota = excluded.quota",
        owner=owner,
        quota=text_of(quota) if quota else None,
    )


def fence_of(lease: Lease) -> dict[str, Any]:
    """The values of `HELD`."""
    return {"worker": lease.worker, "attempt": lease.attempt}


def change(transaction: Transaction, job: str, fence: str, values: dict[str, Any], event: str, **columns: Any) -> bool:
    """Change a job in one statement, and append the event of that.

    Args:
        fence: The condition under which it changes, with its `values`.
        event: The event's kind. Its data are those of the columns that say something to clients.
        columns: The new values.

    Returns:
        Whether the job changed.
    """
    assignments = ", ".join(f"{name} = :new_{name}" for name in columns)
    changed = transaction.run(
        f"UPDATE jobs SET events = events + 1, {assignments} WHERE id = :job AND {fence}",
        job=job,
        **values,
        **{f"new_{name}": value for name, value in columns.items()},
    )
    if changed:
        transaction.run(APPEND, job=job, now=transaction.now, kind=event, data=told(columns))
    return changed == 1


APPEND = (
    "INSERT INTO events (job, sequence, created_at, kind, data) "
    "SELECT id, events, :now, :kind, :data FROM jobs WHERE id = :job"
)
"""Appends an event to a job whose number of events has been counted up."""


TOLD = ("stage", "progress", "attempt", "error")
"""The columns that events repeat."""


def told(columns: Mapping[str, Any]) -> str:
    """The data of an event."""
    found = {name: columns[name] for name in TOLD if columns.get(name) is not None}
    return text_of(found | ({"error": msgspec.Raw(found["error"].encode())} if "error" in found else {}))


def add_objects(transaction: Transaction, objects: Sequence[tuple[str, str]]) -> None:
    """Note which objects jobs have: pairs of an object's name and a job's id."""
    statement = "INSERT INTO objects (name, job) VALUES (:name, :job) ON CONFLICT (name, job) DO NOTHING"
    transaction.run_many(statement, [{"name": name, "job": job} for name, job in objects])


def removals_among(transaction: Transaction, names: Sequence[str]) -> set[str]:
    """Those of some objects that are removable."""
    return _among(transaction, "removals", names)


def known_among(transaction: Transaction, names: Sequence[str]) -> set[str]:
    """Those of some objects that a job has, or that are removable."""
    return _among(transaction, "objects", names) | removals_among(transaction, names)


def _among(transaction: Transaction, table: str, names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for start in range(0, len(names), MOST_NAMES):
        sought, values = listed(names[start : start + MOST_NAMES])
        found |= {row["name"] for row in transaction.rows(f"SELECT name FROM {table} WHERE name IN {sought}", **values)}
    return found


def let_go(transaction: Transaction, jobs: Sequence[str]) -> None:
    """Take their objects from some jobs. Those that no other job has become removable."""
    values = [{"job": job} for job in jobs]
    transaction.run_many(
        "INSERT INTO removals (name) SELECT name FROM objects WHERE job = :job AND NOT EXISTS "
        "(SELECT 1 FROM objects AS others WHERE others.name = objects.name AND others.job <> :job) "
        "ON CONFLICT (name) DO NOTHING",
        values,
    )
    transaction.run_many("DELETE FROM objects WHERE job = :job", values)


def end(transaction: Transaction, job: str, fence: str, values: dict[str, Any], error: Failure | None) -> bool:
    """End a job without a result: it has failed if there is an error, and is cancelled otherwise."""
    state = State.FAILED if error else State.CANCELLED
    columns = {"error": text_of(error)} if error else {}
    time = transaction.time
    has_ended = change(
        transaction, job, fence, values, state, state=state, completed_at=time.wall, ended=time.running, **columns
    )
    if has_ended:
        let_go(transaction, [job])
    return has_ended


def end_all(transaction: Transaction, jobs: Sequence[str]) -> None:
    """Cancel many queued jobs."""
    time, kind = transaction.time, State.CANCELLED
    transaction.run_many(
        "UPDATE jobs SET events = events + 1, state = :kind, completed_at = :now, ended = :running "
        f"WHERE id = :job AND {QUEUED}",
        [{"job": job, "kind": kind, "now": time.wall, "running": time.running} for job in jobs],
    )
    transaction.run_many(APPEND, [{"job": job, "now": time.wall, "kind": kind, "data": told({})} for job in jobs])
    let_go(transaction, jobs)
