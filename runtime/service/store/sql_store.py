"""The job store over a database."""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from wanforge.runtime.service.job import Batch, Failure, Idempotency, Job, JobEvent, Lease, Result, Submission
from wanforge.runtime.service.store import keys, leasing, queries, rows, submitting, sweeping
from wanforge.runtime.service.store.base import (
    ApiKey,
    Census,
    DurationKey,
    JobFilter,
    JobPage,
    JobStore,
    News,
    Offer,
    Policy,
    Pulse,
    Quota,
    Receipt,
)
from wanforge.runtime.service.store.databases.database import Database
from wanforge.runtime.service.store.databases.sqlite import Sqlite

SCHEMES = ("postgres://", "postgresql://")


def open_store(place: str | Path, policy: Policy | None = None, clock: Callable[[], float] | None = None) -> JobStore:
    """Open a job store, which is made if it does not exist.

    Args:
        place: The file of a store in SQLite, or the URL of a database in Postgres.
        clock: Seconds since 1970; for tests.

    Raises:
        StoreError: It cannot be opened, or a newer wanforge has written it.
        ResourceError: psycopg is not installed.
    """
    if str(place).startswith(SCHEMES):
        from wanforge.runtime.service.store.databases.postgres import Postgres

        return SqlStore(Postgres(str(place), clock=clock), policy or Policy())
    return SqlStore(Sqlite(Path(place), clock=clock), policy or Policy())


class SqlStore(JobStore):
    """A job store whose statements SQLite and Postgres have in common."""

    def __init__(self, database: Database, policy: Policy) -> None:
        self.database, self.policy, self.answers_at_once = database, policy, database.answers_at_once

    def submit(self, submission: Submission) -> Receipt:
        with self.database.write() as transaction:
            return submitting.submit(transaction, self.policy, submission)

    def earlier(self, owner: str, mark: Idempotency) -> Job | None:
        with self.database.read() as transaction:
            return submitting.earlier(transaction, owner, mark)

    def submit_batch(self, submissions: Sequence[Submission], batch: str | None = None) -> Batch:
        with self.database.write() as transaction:
            return submitting.submit_batch(transaction, self.policy, submissions, batch)

    def cancel(self, job: str) -> Job | None:
        with self.database.write() as transaction:
            return submitting.cancel(transaction, job)

    def cancel_batch(self, batch: str) -> Batch | None:
        with self.database.write() as transaction:
            return submitting.cancel_batch(transaction, batch)

    def delete(self, job: str) -> bool:
        with self.database.write() as transaction:
            return submitting.delete(transaction, job)

    def get(self, job: str) -> Job | None:
        with self.database.read() as transaction:
            return rows.find(transaction, job)

    def jobs(self, which: JobFilter) -> JobPage:
        with self.database.read() as transaction:
            return queries.jobs(transaction, which)

    def batch(self, batch: str) -> Batch | None:
        with self.database.read() as transaction:
            return queries.batch_of(transaction, batch)

    def position(self, job: str) -> int | None:
        with self.database.read() as transaction:
            return queries.position(transaction, job)

    def positions(self) -> dict[str, int]:
        with self.database.read() as transaction:
            return queries.positions(transaction)

    def latest(self, jobs: Collection[str]) -> dict[str, int]:
        with self.database.read() as transaction:
            return queries.latest(transaction, list(jobs))

    def events(self, job: str, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        with self.database.read() as transaction:
            return queries.events(transaction, job, after, limit)

    def news(self, *, of_progress: bool = True) -> News:
        return self.database.news(of_progress=of_progress)

    def claim(self, offer: Offer) -> Job | None:
        with self.database.write() as transaction:
            return leasing.claim(transaction, self.policy, offer)

    def heartbeat(self, lease: Lease, stage: str | None = None, progress: int = 0) -> Pulse:
        with self.database.write(syncs=False) as transaction:
            return leasing.heartbeat(transaction, self.policy, lease, stage, progress)

    def complete(self, lease: Lease, result: Result) -> bool:
        with self.database.write() as transaction:
            return leasing.complete(transaction, self.policy, lease, result)

    def fail(self, lease: Lease, failure: Failure) -> bool:
        with self.database.write() as transaction:
            return leasing.fail(transaction, lease, failure)

    def stopped(self, lease: Lease) -> bool:
        with self.database.write() as transaction:
            return leasing.stopped(transaction, lease)

    def requeue(self, lease: Lease, *, counts: bool) -> bool:
        with self.database.write() as transaction:
            return leasing.requeue(transaction, self.policy, lease, counts=counts)

    def release(self, workers: Collection[str], *, counts: bool) -> list[str]:
        with self.database.write() as transaction:
            return leasing.release(transaction, self.policy, workers, counts=counts)

    def sweep(self) -> list[str]:
        with self.database.write() as transaction:
            return sweeping.sweep(transaction, self.policy)

    def fail_unserved(self, served: Collection[str], after_seconds: float) -> list[str]:
        with self.database.write() as transaction:
            return sweeping.fail_unserved(transaction, served, after_seconds)

    def removable(self, limit: int = 1000) -> list[str]:
        with self.database.read() as transaction:
            found = transaction.rows("SELECT name FROM removals ORDER BY name LIMIT :most", most=limit)
            return [row["name"] for row in found]

    def removed(self, objects: Collection[str]) -> None:
        if objects:
            with self.database.write() as transaction:
                statement = "DELETE FROM removals WHERE name = :name"
                transaction.run_many(statement, [{"name": name} for name in objects])

    def known(self, objects: Collection[str]) -> set[str]:
        with self.database.read() as transaction:
            return rows.known_among(transaction, list(objects))

    def census(self) -> Census:
        with self.database.read() as transaction:
            return queries.census(transaction)

    def durations(self, key: DurationKey, limit: int = 50) -> list[float]:
        with self.database.read() as transaction:
            return queries.durations(transaction, key, limit)

    def add_key(self, owner: str, scopes: Iterable[str] = ()) -> tuple[ApiKey, str]:
        with self.database.write() as transaction:
            return keys.add_key(transaction, owner, scopes)

    def api_keys(self) -> list[ApiKey]:
        with self.database.read() as transaction:
            return keys.keys(transaction)

    def revoke_key(self, key: str) -> bool:
        with self.database.write() as transaction:
            return keys.revoke_key(transaction, key)

    def verify_key(self, text: str) -> ApiKey | None:
        with self.database.read() as transaction:
            return keys.verify_key(transaction, text)

    def set_quota(self, owner: str, quota: Quota | None) -> None:
        with self.database.write() as transaction:
            rows.set_quota(transaction, owner, quota)

    def quota(self, owner: str) -> Quota:
        with self.database.read() as transaction:
            return rows.quota_of(transaction, owner, self.policy.quota)

    def close(self) -> None:
        self.database.close()
