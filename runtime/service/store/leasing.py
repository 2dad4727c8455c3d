"""What workers change: claims, heartbeats and how attempts end."""

from collections.abc import Collection, Sequence
from typing import Any

from wanforge.runtime.service.job import Failure, Job, Lease, Result, State
from wanforge.runtime.service.live.terms import LIVE
from wanforge.runtime.service.store.base import LEFT_SECONDS, MOST_PASSES, BundleShape, Offer, Policy, Pulse
from wanforge.runtime.service.store.databases.database import Row, Transaction, listed
from wanforge.runtime.service.store.rows import (
    HELD,
    QUEUED,
    RUNNING,
    add_objects,
    change,
    end,
    fence_of,
    find,
    quota_of,
    text_of,
)


def claim(transaction: Transaction, policy: Policy, offer: Offer) -> Job | None:
    """Give a worker the next job that it can serve."""
    end_leases(transaction, policy)
    found = _next(transaction, policy, offer)
    if found is None:
        return None
    time, job = transaction.time, found["id"]
    is_claimed = change(
        transaction,
        job,
        QUEUED,
        {},
        "started",
        state=State.IN_PROGRESS,
        worker=offer.worker,
        attempt=found["attempt"] + 1,
        lease_until=time.running + policy.lease_seconds,
        began=time.running,
        started_at=time.wall,
        stage=None,
        progress=0,
    )
    assert is_claimed, "writers take turns"
    turn = transaction.count_up("claims") + 1
    transaction.run("UPDATE owners SET served = :turn WHERE owner = :owner", turn=turn, owner=found["owner"])
    return find(transaction, job)


def heartbeat(transaction: Transaction, policy: Policy, lease: Lease, stage: str | None, progress: int) -> Pulse:
    """Extend a lease, and append an event where there is something to tell."""
    row = transaction.row(
        f"SELECT stage, progress, cancel_requested FROM jobs WHERE id = :job AND {HELD}",
        job=lease.job,
        **fence_of(lease),
    )
    if row is None:
        return Pulse(is_held=False, cancel_requested=False)
    until = transaction.time.running + policy.lease_seconds
    now = {"stage": stage or row["stage"], "progress": max(row["progress"], min(progress, 100))}
    if now != {"stage": row["stage"], "progress": row["progress"]}:
        change(transaction, lease.job, HELD, fence_of(lease), "progress", lease_until=until, **now)
    else:
        statement = f"UPDATE jobs SET lease_until = :until WHERE id = :job AND {HELD}"
        transaction.run(statement, until=until, job=lease.job, **fence_of(lease))
    return Pulse(is_held=True, cancel_requested=bool(row["cancel_requested"]))


def complete(transaction: Transaction, policy: Policy, lease: Lease, result: Result) -> bool:
    """End a job with a result."""
    time = transaction.time
    is_done = change(
        transaction,
        lease.job,
        HELD,
        fence_of(lease),
        State.COMPLETED,
        state=State.COMPLETED,
        progress=100,
        result=text_of(result),
        completed_at=time.wall,
        expires_at=time.wall + policy.result_seconds,
        ended=time.running,
    )
    if is_done:
        add_objects(transaction, [(name, lease.job) for name in result.objects.values()])
        transaction.run(
            "INSERT INTO durations (bundle, shape, steps, backend, seconds, ended, created_at) "
            "SELECT bundle, shape, steps, :backend, ended - began, ended, completed_at FROM jobs WHERE id = :job",
            backend=result.backend,
            job=lease.job,
        )
    return is_done or _has_ended(transaction, lease, State.COMPLETED)


def fail(transaction: Transaction, lease: Lease, failure: Failure) -> bool:
    """End a job with an error."""
    return end(transaction, lease.job, HELD, fence_of(lease), failure) or _has_ended(transaction, lease, State.FAILED)


def stopped(transaction: Transaction, lease: Lease) -> bool:
    """End a job that was to be cancelled."""
    has_stopped = end(transaction, lease.job, f"{HELD} AND cancel_requested = 1", fence_of(lease), None)
    return has_stopped or _has_ended(transaction, lease, State.CANCELLED)


def requeue(transaction: Transaction, policy: Policy, lease: Lease, *, counts: bool) -> bool:
    """End an attempt: the job waits for the next one, unless it is to be cancelled or has lost enough workers."""
    row = transaction.row(
        f"SELECT lost, shape, cancel_requested FROM jobs WHERE id = :job AND {HELD}", job=lease.job, **fence_of(lease)
    )
    if row is None:
        return False
    if row["cancel_requested"]:
        return end(transaction, lease.job, HELD, fence_of(lease), None)
    lost = row["lost"] + counts
    if lost >= (1 if row["shape"] == LIVE else policy.most_lost):  # nobody watches another attempt of a stream
        times = "once" if lost == 1 else f"{lost} times"
        message = f"the worker that made this clip died {times}; the request may need more memory than it has"
        return end(transaction, lease.job, HELD, fence_of(lease), Failure("worker_died", message))
    return change(
        transaction,
        lease.job,
        HELD,
        fence_of(lease),
        "requeued",
        state=State.QUEUED,
        lost=lost,
        lease_until=None,
        stage=None,
        progress=0,
    )


def release(transaction: Transaction, policy: Policy, workers: Collection[str], *, counts: bool) -> list[str]:
    """End the attempts of some workers."""
    names, values = listed(workers)
    return _requeue_all(transaction, policy, f"worker IN {names}", values, counts=counts)


def end_leases(transaction: Transaction, policy: Policy) -> list[str]:
    """End the attempts whose leases have run out."""
    now = {"running": transaction.time.running}
    return _requeue_all(transaction, policy, "lease_until <= :running", now, counts=True)


def _requeue_all(
    transaction: Transaction, policy: Policy, condition: str, values: dict[str, Any], *, counts: bool
) -> list[str]:
    rows = transaction.rows(f"SELECT id, worker, attempt FROM jobs WHERE {RUNNING} AND {condition}", **values)
    for row in rows:
        requeue(transaction, policy, Lease(row["id"], row["worker"], row["attempt"]), counts=counts)
    return [row["id"] for row in rows]


def _has_ended(transaction: Transaction, lease: Lease, state: State) -> bool:
    """Whether this attempt has ended in this way before: the worker asks again because it got no answer."""
    row = transaction.row(
        "SELECT id FROM jobs WHERE id = :job AND state = :state AND worker = :worker AND attempt = :attempt",
        job=lease.job,
        state=state,
        **fence_of(lease),
    )
    return row is not None


def _next(transaction: Transaction, policy: Policy, offer: Offer) -> Row | None:
    """The job to claim: that of the owner whose turn it is which has waited longest for its priority."""
    bundles, values = listed(offer.bundles)
    is_left = "1 = 0"
    if offer.left:
        left, shapes = listed_shapes(offer.left)
        is_left = f"queued > :since AND {left}"
        values |= {**shapes, "since": transaction.time.running - LEFT_SECONDS}
    queues = transaction.rows(
        f"""
        SELECT * FROM (
            SELECT owner, served,
                (SELECT count(*) FROM jobs WHERE jobs.owner = owners.owner AND {RUNNING}) AS running,
                (SELECT id FROM jobs WHERE jobs.owner = owners.owner AND {QUEUED} AND bundle IN {bundles}
                    AND NOT ({is_left}) ORDER BY place, number LIMIT 1) AS head
            FROM owners
        ) AS queues WHERE head IS NOT NULL ORDER BY running, served, owner
        """,
        **values,
    )
    for queue in queues:
        most = quota_of(transaction, queue["owner"], policy.quota).running
        if most is None or queue["running"] < most:
            head = transaction.row("SELECT * FROM jobs WHERE id = :job", job=queue["head"])
            assert head is not None
            return _warm(transaction, head, offer) or head
    return None


def _warm(transaction: Transaction, head: Row, offer: Offer) -> Row | None:
    """The job that is taken in place of another one because the worker is warm for it."""
    if not offer.warm or (head["bundle"], head["shape"]) in offer.warm or head["passes"] >= MOST_PASSES:
        return None
    is_warm, shapes = listed_shapes(offer.warm)
    found = transaction.row(
        f"SELECT * FROM jobs WHERE owner = :owner AND {QUEUED} AND priority = :priority AND {is_warm} "
        "ORDER BY place, number LIMIT 1",
        owner=head["owner"],
        priority=head["priority"],
        **shapes,
    )
    if found:
        transaction.run("UPDATE jobs SET passes = passes + 1 WHERE id = :job", job=head["id"])
    return found


def listed_shapes(shapes: Sequence[BundleShape]) -> tuple[str, dict[str, Any]]:
    """The condition that a job has one of some bundles with its shape, and the values that it names."""
    names, values = listed([f"{bundle} {shape}" for bundle, shape in shapes], "shape")
    return f"bundle || ' ' || shape IN {names}", values
