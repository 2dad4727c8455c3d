"""What clients change: submitting, cancelling and deleting jobs."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from wanforge.errors import join_names
from wanforge.runtime.service.job import Batch, Idempotency, Job, State, Submission
from wanforge.runtime.service.store.base import Policy, Receipt, TurnedAwayError
from wanforge.runtime.service.store.databases.database import Transaction
from wanforge.runtime.service.store.queries import batch_of
from wanforge.runtime.service.store.rows import (
    ENDED,
    QUEUED,
    RUNNING,
    add_objects,
    change,
    end,
    end_all,
    find,
    let_go,
    new_id,
    quota_of,
    removals_among,
    text_of,
    told,
)

UNKNOWN_WAIT = 30
"""Seconds to wait before trying again where no job has been completed yet."""
LATEST = 20
"""The number of jobs from whose durations a wait is estimated."""


def submit(transaction: Transaction, policy: Policy, submission: Submission) -> Receipt:
    """Add a job, unless its key of idempotency says that it has been added."""
    known = earlier(transaction, submission.owner, submission.idempotency)
    if known:
        return Receipt(known, is_new=False)
    _check_room(transaction, policy, submission.owner, 0 if submission.refused else 1)
    [job] = _insert(transaction, policy, [submission], None)
    return Receipt(_present(transaction, job), is_new=True)


def submit_batch(
    transaction: Transaction, policy: Policy, submissions: Sequence[Submission], batch: str | None
) -> Batch:
    """Add the jobs of a batch, unless the batch is there, by its id or by the first job's key of idempotency."""
    if not submissions:
        raise TurnedAwayError("batch_empty", "the batch has no line; send at least one request, one JSON object a line")
    owner = submissions[0].owner
    if any(each.owner != owner for each in submissions):
        raise ValueError("all jobs of a batch have one owner")
    if batch and (found := batch_of(transaction, batch)):
        if found.owner != owner:
            raise TurnedAwayError("idempotency_conflict", f"the batch {batch} is somebody else's; use another id")
        return found
    known = earlier(transaction, owner, submissions[0].idempotency)
    if known and known.batch and (found := batch_of(transaction, known.batch)):
        return found
    batch = batch or new_id("batch")
    _check_room(transaction, policy, owner, sum(each.refused is None for each in submissions))
    transaction.run(
        "INSERT INTO batches (id, owner, created_at) VALUES (:batch, :owner, :now)",
        batch=batch,
        owner=owner,
        now=transaction.now,
    )
    _insert(transaction, policy, submissions, batch)
    found = batch_of(transaction, batch)
    assert found is not None
    return found


def cancel(transaction: Transaction, job: str) -> Job | None:
    """Cancel a queued job, or request it of a running one."""
    if not end(transaction, job, QUEUED, {}, None):
        change(transaction, job, f"{RUNNING} AND cancel_requested = 0", {}, "cancel_requested", cancel_requested=1)
    return find(transaction, job)


def cancel_batch(transaction: Transaction, batch: str) -> Batch | None:
    """Cancel the jobs of a batch that have not ended."""
    for row in transaction.rows(f"SELECT id FROM jobs WHERE batch = :batch AND {RUNNING}", batch=batch):
        cancel(transaction, row["id"])
    queued = transaction.rows(f"SELECT id FROM jobs WHERE batch = :batch AND {QUEUED}", batch=batch)
    end_all(transaction, [row["id"] for row in queued])
    return batch_of(transaction, batch)


def delete(transaction: Transaction, job: str) -> bool:
    """Delete a job that has ended."""
    if not transaction.run(f"DELETE FROM jobs WHERE id = :job AND {ENDED}", job=job):
        if find(transaction, job):
            raise TurnedAwayError("job_active", f"the job {job} has not ended; cancel it before you delete it")
        return False
    transaction.run("DELETE FROM events WHERE job = :job", job=job)
    transaction.run("DELETE FROM idempotency WHERE job = :job", job=job)
    let_go(transaction, [job])
    return True


def _present(transaction: Transaction, job: str) -> Job:
    found = find(transaction, job)
    assert found is not None
    return found


def earlier(transaction: Transaction, owner: str, mark: Idempotency | None) -> Job | None:
    """The job that was submitted with the same key."""
    if mark is None:
        return None
    row = transaction.row(
        "SELECT digest, job FROM idempotency WHERE owner = :owner AND key = :key", owner=owner, key=mark.key
    )
    if row is None:
        return None
    if row["digest"] != mark.digest:
        raise TurnedAwayError(
            "idempotency_conflict",
            f"the idempotency key {mark.key!r} was used for another request, job {row['job']}; use a new key for each "
            "request, and the same one only to repeat it",
        )
    return _present(transaction, row["job"])


def _check_room(transaction: Transaction, policy: Policy, owner: str, count: int) -> None:
    """Refuse jobs that do not fit into the queue."""
    if not count:
        return
    queued = transaction.number(f"SELECT count(*) AS n FROM jobs WHERE {QUEUED}")
    if queued + count > policy.most_queued:
        raise TurnedAwayError(
            "queue_full",
            f"the queue has {queued} of at most {policy.most_queued} jobs, and {count} more do not fit; try later",
            _wait(transaction),
        )
    most = quota_of(transaction, owner, policy.quota).queued
    own = transaction.number(f"SELECT count(*) AS n FROM jobs WHERE owner = :owner AND {QUEUED}", owner=owner)
    if most is not None and own + count > most:
        raise TurnedAwayError(
            "too_many_queued",
            f"{owner} has {own} of at most {most} queued jobs, and {count} more do not fit; wait for some to start",
            _wait(transaction),
        )


def _wait(transaction: Transaction) -> int:
    """Seconds in which one job should start: the time that a job took lately, shared by those that are running."""
    rows = transaction.rows("SELECT seconds FROM durations ORDER BY ended DESC LIMIT :latest", latest=LATEST)
    if not rows:
        return UNKNOWN_WAIT
    running = transaction.number(f"SELECT count(*) AS n FROM jobs WHERE {RUNNING}")
    return max(1, math.ceil(statistics.median(row["seconds"] for row in rows) / max(1, running)))


def _insert(
    transaction: Transaction, policy: Policy, submissions: Sequence[Submission], batch: str | None
) -> list[str]:
    """Insert jobs with their events and objects, and the first one's key of idempotency. Returns their ids."""
    _check_objects(transaction, submissions)
    transaction.run(
        "INSERT INTO owners (owner) VALUES (:owner) ON CONFLICT (owner) DO NOTHING", owner=submissions[0].owner
    )
    first = transaction.count_up("jobs", len(submissions))
    rows = [
        _row(transaction, policy, submission)
        | {"number": first + place, "batch": batch, "line": place if batch else None}
        for place, submission in enumerate(submissions)
    ]
    names = list(rows[0])
    values = ", ".join(f":{name}" for name in names)
    transaction.run_many(f"INSERT INTO jobs ({', '.join(names)}) VALUES ({values})", rows)
    transaction.run_many(
        "INSERT INTO events (job, sequence, created_at, kind, data) VALUES (:id, 1, :now, :state, :data)",
        [{"id": row["id"], "now": transaction.now, "state": row["state"], "data": told(row)} for row in rows],
    )
    names_of = zip(rows, submissions, strict=True)
    add_objects(transaction, [(name, row["id"]) for row, each in names_of for name in each.objects])
    let_go(transaction, [row["id"] for row in rows if row["state"] != State.QUEUED])
    if mark := submissions[0].idempotency:
        transaction.run(
            "INSERT INTO idempotency (owner, key, digest, job, created_at) VALUES (:owner, :key, :digest, :job, :now)",
            owner=submissions[0].owner,
            key=mark.key,
            digest=mark.digest,
            job=rows[0]["id"],
            now=transaction.now,
        )
    return [row["id"] for row in rows]


def _row(transaction: Transaction, policy: Policy, submission: Submission) -> dict[str, Any]:
    """The columns of a new job."""
    time, refused = transaction.time, submission.refused
    return {
        "id": new_id("video"),
        "owner": submission.owner,
        "bundle": submission.bundle,
        "shape": submission.shape,
        "steps": submission.steps,
        "request": text_of(submission.request),
        "priority": submission.priority,
        "objects": text_of(submission.objects),
        "state": State.FAILED if refused else State.QUEUED,
        "error": text_of(refused) if refused else None,
        "completed_at": time.wall if refused else None,
        "queued": time.running,
        "place": time.running - submission.priority * policy.ageing_seconds,
        "created_at": time.wall,
        "events": 1,
    }


def _check_objects(transaction: Transaction, submissions: Sequence[Submission]) -> None:
    """Refuse jobs that read what is being removed."""
    names = sorted({name for submission in submissions for name in submission.objects})
    if removable := removals_among(transaction, names):
        raise TurnedAwayError(
            "object_gone", f"{join_names(sorted(removable))} has expired or was deleted; upload it again"
        )
