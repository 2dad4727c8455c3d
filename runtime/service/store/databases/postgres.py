"""A store in Postgres, for the processes of several machines.

Writers take turns by an advisory lock, as they do in SQLite by its file lock: fairness, quotas and the numbers of
events are properties of the whole queue, which a claim that skips locked rows does not see.
"""

import re
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from wanforge.errors import ResourceError
from wanforge.requirements import install_extra
from wanforge.runtime.service.store.base import AT_ONCE, News, StoreError
from wanforge.runtime.service.store.databases.database import Database, Transaction
from wanforge.runtime.service.store.databases.schema import migrate

LOCK = 0x77616E66
"""The number of the lock by which writers take turns."""
CHANNEL = "wanforge_jobs"
PROGRESS = "progress"
"""What is said of heartbeats, by which no worker gets a job."""
LARGEST_WAIT = 30
"""Seconds after which Postgres ends a statement, or a transaction that does nothing because its process hangs."""

NETWORK = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
"""Parameters of libpq, unless a URL names them. Without them, a process waits a quarter of an hour for an answer of a
host that has vanished, and hours for its news, since Postgres itself counts the seconds of `LARGEST_WAIT`."""

REMEDIES = {
    "55P03": ("store_busy", "is locked by another process; try again"),
    "57014": ("store_busy", "took too long; try again"),
    "53100": ("store_full", "has no room, so nothing was changed; free some space on the disk of its server"),
    "53300": ("store_busy", "has no connection left; raise max_connections of its server"),
    "XX001": ("store_damaged", "is damaged; restore it from a backup"),
}
"""By SQLSTATE: the code of the `StoreError`, what is wrong and what to do."""


@cache
def psycopg() -> Any:
    """The module psycopg, which only those need who have Postgres.

    Raises:
        ResourceError: It is not installed.
    """
    try:
        import psycopg
    except ModuleNotFoundError as error:
        raise ResourceError(f"a job store in Postgres needs psycopg; run: {install_extra('postgres')}") from error
    return psycopg


class Postgres(Database):
    """A database of a Postgres server.

    Args:
        url: How to connect, in any form that libpq knows.
        busy_seconds: How long to wait for others that write.
        clock: Seconds since 1970; the server's clock if None, which is the same for all machines.
    """

    def __init__(self, url: str, busy_seconds: float = 10.0, clock: Callable[[], float] | None = None) -> None:
        super().__init__("in Postgres", clock)
        self._busy_seconds = busy_seconds
        with self.errors():
            named = psycopg().conninfo.conninfo_to_dict(url)
        self.place, self._parameters = place_of(named), {**NETWORK, **named}
        self.prepare(migrate)

    def connect(self) -> Any:
        library = psycopg()
        connection = library.connect(**self._parameters, autocommit=True, row_factory=library.rows.dict_row)
        connection.prepare_threshold = None  # a prepared query would fail once a newer wanforge has added a column
        connection.execute(
            f"SET lock_timeout = {int(self._busy_seconds * 1000)};"
            f"SET statement_timeout = '{LARGEST_WAIT}s';"
            f"SET idle_in_transaction_session_timeout = '{LARGEST_WAIT}s';"
            "SET synchronous_commit = on; SET client_min_messages = warning"
        )
        return connection

    def begin(self, connection: Any, *, writes: bool, syncs: bool = True) -> Transaction:
        if writes:
            commits = "" if syncs else "SET LOCAL synchronous_commit = off;"
            connection.execute(f"BEGIN; {commits} SELECT pg_advisory_xact_lock({LOCK})")
        else:
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        return Transaction(partial(_execute, connection), partial(_execute_many, connection))

    def is_broken(self, connection: Any) -> bool:
        return bool(connection.closed)

    def explained(self, error: Exception) -> StoreError | None:
        if not isinstance(error, psycopg().Error):
            return None
        said = " ".join(str(error).split())
        if error.sqlstate in REMEDIES:
            name, remedy = REMEDIES[error.sqlstate]
            return StoreError(name, f"the job store {self.place} {remedy} ({said})")
        if isinstance(error, psycopg().OperationalError | psycopg().InterfaceError):
            return StoreError(
                "store_unreachable", f"the job store {self.place} cannot be reached; check its server ({said})"
            )
        return None

    def wall(self, transaction: Transaction) -> float:
        found = transaction.row("SELECT extract(epoch FROM clock_timestamp())::double precision AS wall")
        assert found is not None
        return float(found["wall"])

    def announce(self, transaction: Transaction, *, is_progress: bool) -> None:
        transaction.rows(f"SELECT pg_notify('{CHANNEL}', '{PROGRESS if is_progress else ''}')")

    def news(self, *, of_progress: bool = True) -> News:
        with self.errors():
            return PostgresNews(self, of_progress=of_progress)


class PostgresNews(News):
    """Listens to what transactions announce. A connection that breaks is made again, which counts as news."""

    def __init__(self, database: Postgres, *, of_progress: bool) -> None:
        self._database = database
        self._ignored = None if of_progress else PROGRESS
        self._connection = self._listen()

    def wait(self, seconds: float, delay: float = AT_ONCE) -> bool:
        end = time.monotonic() + seconds
        with self._database.errors():
            try:
                while True:
                    found = list(self._connection.notifies(timeout=max(0.0, end - time.monotonic()), stop_after=1))
                    found += self._connection.notifies(timeout=0) if found else []
                    if any(each.payload != self._ignored for each in found):
                        return True
                    if time.monotonic() >= end:
                        return False
            except psycopg().OperationalError:
                self._connection.close()
                time.sleep(min(1.0, seconds))
                self._connection = self._listen()
                return True

    def close(self) -> None:
        self._connection.close()

    def _listen(self) -> Any:
        connection = self._database.connect()
        connection.execute(f"LISTEN {CHANNEL}")
        return connection


@cache
def translated(statement: str) -> str:
    """A statement with its values named as psycopg names them. Casts (``::``) stay as they are."""
    return re.sub(r"(?<!:):(\w+)", r"%(\1)s", statement)


def _execute(connection: Any, statement: str, values: Mapping[str, Any]) -> Any:
    return connection.execute(translated(statement), values or None)


def _execute_many(connection: Any, statement: str, values: Any) -> None:
    with connection.cursor() as cursor:
        cursor.executemany(translated(statement), values)


def place_of(named: Mapping[str, str]) -> str:
    """Where a database is, as messages say it.

    Args:
        named: What a URL says. It may leave everything to a section of libpq's service file.
    """
    if "service" in named:
        return f"in the Postgres database of the service {named['service']!r}"
    return f"in the Postgres database {named.get('dbname', '')!r} at {named.get('host', 'localhost')}"
