"""What time asks for."""

from collections.abc import Collection

from wanforge.runtime.service.job import Failure, State
from wanforge.runtime.service.store.base import Policy
from wanforge.runtime.service.store.databases.database import Transaction, listed
from wanforge.runtime.service.store.leasing import end_leases
from wanforge.runtime.service.store.rows import ENDED, QUEUED, change, end, let_go
from wanforge.runtime.service.store.submitting import delete

MOST, MOST_EVENTS = 200, 5000
"""The numbers of jobs and of events that one sweep expires or deletes, so that others need not wait for long."""

SEEN_SECONDS = 15.0
"""How often it is noted that a bundle is served. Each note wakes those who wait for news."""
GONE = Failure("bundle_gone", "nobody serves the bundle of this request any more; submit it again")


def sweep(transaction: Transaction, policy: Policy) -> list[str]:
    """End leases, and expire and forget what is due."""
    changed = end_leases(transaction, policy)
    if transaction.time.is_settled:
        changed += _expire(transaction)
        _forget(transaction, policy)
    return changed


def fail_unserved(transaction: Transaction, served: Collection[str], after_seconds: float) -> list[str]:
    """Note which bundles are served, and fail the jobs of those that are not."""
    running = transaction.time.running
    for bundle in served:
        transaction.run(
            "INSERT INTO served (bundle, seen) VALUES (:bundle, :running) "
            "ON CONFLICT (bundle) DO UPDATE SET seen = excluded.seen WHERE served.seen < excluded.seen - :pause",
            bundle=bundle,
            running=running,
            pause=SEEN_SECONDS,
        )
    names, values = listed(served)
    rows = transaction.rows(
        f"SELECT id FROM jobs WHERE {QUEUED} AND queued <= :before AND bundle NOT IN {names} AND NOT EXISTS "
        "(SELECT 1 FROM served WHERE served.bundle = jobs.bundle AND served.seen > :before) LIMIT :most",
        before=running - after_seconds,
        most=MOST,
        **values,
    )
    return [row["id"] for row in rows if end(transaction, row["id"], QUEUED, {}, GONE)]


def _expire(transaction: Transaction) -> list[str]:
    """Take their results from the jobs that have had them for long enough."""
    rows = transaction.rows(
        "SELECT id FROM jobs WHERE state = 'completed' AND expires_at <= :now ORDER BY expires_at LIMIT :most",
        now=transaction.now,
        most=MOST,
    )
    for row in rows:
        fence = "state = 'completed'"
        if change(transaction, row["id"], fence, {}, State.EXPIRED, state=State.EXPIRED, result=None):
            let_go(transaction, [row["id"]])
    return [row["id"] for row in rows]


def _forget(transaction: Transaction, policy: Policy) -> None:
    """Delete events, idempotency keys, durations, jobs and batches that are old enough."""
    now = transaction.now
    transaction.run(
        "DELETE FROM events WHERE (job, sequence) IN (SELECT job, sequence FROM events WHERE created_at <= :before AND "
        f"job IN (SELECT id FROM jobs WHERE {ENDED}) ORDER BY created_at LIMIT :most)",
        before=now - policy.event_seconds,
        most=MOST_EVENTS,
    )
    transaction.run("DELETE FROM idempotency WHERE created_at <= :before", before=now - policy.key_seconds)
    before = now - policy.record_seconds
    transaction.run("DELETE FROM durations WHERE created_at <= :before", before=before)
    for state in (State.FAILED, State.CANCELLED, State.EXPIRED):
        rows = transaction.rows(
            "SELECT id FROM jobs WHERE state = :state AND completed_at <= :before LIMIT :most",
            state=state,
            before=before,
            most=MOST,
        )
        for row in rows:
            delete(transaction, row["id"])
    transaction.run("DELETE FROM batches WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.batch = batches.id)")
