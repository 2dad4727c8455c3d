"""The tables of a store, as the steps that lead from an empty database to the present version.

The statements are those that SQLite and Postgres have in common. A step that has been released is never changed.
"""

from wanforge.runtime.service.store.base import StoreError
from wanforge.runtime.service.store.databases.database import Transaction

FIRST = """
CREATE TABLE clock (
    wall DOUBLE PRECISION NOT NULL,
    running DOUBLE PRECISION NOT NULL,
    settled DOUBLE PRECISION NOT NULL,
    jobs BIGINT NOT NULL,
    claims BIGINT NOT NULL
);
INSERT INTO clock VALUES (0, 0, 0, 0, 0);
CREATE TABLE jobs (
    number BIGINT PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    bundle TEXT NOT NULL,
    shape TEXT NOT NULL,
    steps BIGINT NOT NULL,
    request TEXT NOT NULL,
    priority BIGINT NOT NULL,
    objects TEXT NOT NULL,
    batch TEXT,
    line BIGINT,
    state TEXT NOT NULL,
    queued DOUBLE PRECISION NOT NULL,
    place DOUBLE PRECISION NOT NULL,
    worker TEXT,
    attempt BIGINT NOT NULL DEFAULT 0,
    lost BIGINT NOT NULL DEFAULT 0,
    began DOUBLE PRECISION,
    ended DOUBLE PRECISION,
    lease_until DOUBLE PRECISION,
    cancel_requested BIGINT NOT NULL DEFAULT 0,
    stage TEXT,
    progress BIGINT NOT NULL DEFAULT 0,
    created_at DOUBLE PRECISION NOT NULL,
    started_at DOUBLE PRECISION,
    completed_at DOUBLE PRECISION,
    expires_at DOUBLE PRECISION,
    result TEXT,
    error TEXT,
    events BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX jobs_of_batch ON jobs (batch, state);
CREATE INDEX jobs_of_owner ON jobs (owner, number);
CREATE INDEX jobs_by_lease ON jobs (state, lease_until);
CREATE INDEX jobs_by_end ON jobs (state, completed_at);
CREATE INDEX jobs_by_expiry ON jobs (state, expires_at);
CREATE TABLE events (
    job TEXT NOT NULL,
    sequence BIGINT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job, sequence)
);
CREATE INDEX events_by_age ON events (created_at);
CREATE TABLE owners (
    owner TEXT PRIMARY KEY,
    served BIGINT NOT NULL DEFAULT 0,
    quota TEXT
);
CREATE TABLE batches (id TEXT PRIMARY KEY, owner TEXT NOT NULL, created_at DOUBLE PRECISION NOT NULL);
CREATE TABLE idempotency (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    digest TEXT NOT NULL,
    job TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (owner, key)
);
CREATE INDEX idempotency_of_job ON idempotency (job);
CREATE TABLE objects (name TEXT NOT NULL, job TEXT NOT NULL, PRIMARY KEY (name, job));
CREATE INDEX objects_of_job ON objects (job);
CREATE TABLE removals (name TEXT PRIMARY KEY);
CREATE TABLE api_keys (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    hash TEXT NOT NULL,
    scopes TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    revoked_at DOUBLE PRECISION
)
"""

DURATIONS = """
ALTER TABLE jobs ADD COLUMN passes BIGINT NOT NULL DEFAULT 0;
CREATE INDEX jobs_by_place ON jobs (owner, state, place, number, bundle, shape, priority);
CREATE TABLE durations (
    bundle TEXT NOT NULL,
    shape TEXT NOT NULL,
    steps BIGINT NOT NULL,
    backend TEXT NOT NULL,
    seconds DOUBLE PRECISION NOT NULL,
    ended DOUBLE PRECISION NOT NULL,
    created_at DOUBLE PRECISION NOT NULL
);
CREATE INDEX durations_by_end ON durations (ended);
CREATE INDEX durations_of_kind ON durations (bundle, shape, steps, ended);
INSERT INTO durations
    SELECT bundle, shape, steps, '', ended - began, ended, completed_at FROM jobs WHERE state = 'completed'
"""
"""How long jobs took, also those of before, of which it is not known which backend made them."""

SERVED = "CREATE TABLE served (bundle TEXT PRIMARY KEY, seen DOUBLE PRECISION NOT NULL)"
"""When bundles were served last, in running time."""

MACHINES = "CREATE TABLE machines (name TEXT PRIMARY KEY, seen DOUBLE PRECISION NOT NULL, status TEXT NOT NULL)"
"""What the machines that share the store last told of their workers, and when, by the database's clock."""

STEPS = (FIRST, DURATIONS, SERVED, MACHINES)


def migrate(transaction: Transaction, place: str) -> None:
    """Bring a database to the present version.

    Raises:
        StoreError: A newer wanforge has written it.
    """
    transaction.run("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)")
    found = transaction.row("SELECT version FROM schema_version")
    version = found["version"] if found else 0
    if version > len(STEPS):
        raise StoreError(
            "store_newer",
            f"the job store {place} has schema version {version}, and this wanforge knows versions up to {len(STEPS)}; "
            "use the wanforge that wrote it, or a newer one",
        )
    if version == len(STEPS):
        return
    for step in STEPS[version:]:
        for statement in step.split(";"):
            transaction.run(statement)
    transaction.run("DELETE FROM schema_version")
    transaction.run("INSERT INTO schema_version VALUES (:version)", version=len(STEPS))
