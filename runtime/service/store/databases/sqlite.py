"""A store in a file of SQLite, for the processes of one machine."""

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from wanforge.runtime.service.store.base import AT_ONCE, News, StoreError
from wanforge.runtime.service.store.databases.database import Database, Transaction
from wanforge.runtime.service.store.databases.schema import migrate

RETRY_SECONDS = 0.01
"""How long to wait before a database that is locked is tried again."""
MOST_WAL_BYTES = 1 << 26
"""The size to which the write-ahead log is cut when it has been copied into the database."""

REMEDIES = {
    sqlite3.SQLITE_BUSY: ("store_busy", "is locked by another process; end the process that holds it, and try again"),
    sqlite3.SQLITE_LOCKED: ("store_busy", "is locked by another connection; try again"),
    sqlite3.SQLITE_FULL: ("store_full", "cannot grow, so nothing was changed; free some space on its disk"),
    sqlite3.SQLITE_CORRUPT: ("store_damaged", "is damaged; restore it from a backup"),
    sqlite3.SQLITE_NOTADB: ("store_damaged", "is no SQLite database; choose another file"),
    sqlite3.SQLITE_READONLY: ("store_unreachable", "cannot be written to; check its permissions"),
    sqlite3.SQLITE_CANTOPEN: ("store_unreachable", "cannot be opened; check the path and its permissions"),
    sqlite3.SQLITE_IOERR: ("store_unreachable", "cannot be read or written; check its disk"),
}
"""By primary result code: the code of the `StoreError`, what is wrong and what to do."""


class Sqlite(Database):
    """A file in write-ahead mode.

    Args:
        path: The file. It is made if it does not exist, for this user only. Network file systems do not work.
        busy_seconds: How long to wait for another process that writes.
        clock: Seconds since 1970; the machine's clock if None.
    """

    answers_at_once = True

    def __init__(self, path: Path, busy_seconds: float = 10.0, clock: Callable[[], float] | None = None) -> None:
        super().__init__(str(path), clock)
        self._path = path.absolute()
        self._busy_seconds = busy_seconds
        with self.errors():
            self._create()
        self.prepare(migrate)

    def _create(self) -> None:
        """Make the file, and switch it to write-ahead mode, for which SQLite does not wait by itself."""
        with suppress(FileExistsError):
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        end = time.monotonic() + self._busy_seconds
        connection = sqlite3.connect(self._path)
        try:
            while True:
                try:
                    connection.execute("PRAGMA journal_mode = WAL").fetchall()
                    return
                except sqlite3.OperationalError as error:
                    if primary(error) != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                        raise
                    time.sleep(RETRY_SECONDS)
        finally:
            connection.close()

    def connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        connection.execute(f"PRAGMA journal_size_limit = {MOST_WAL_BYTES}")
        return connection

    def begin(self, connection: sqlite3.Connection, *, writes: bool, syncs: bool = True) -> Transaction:
        connection.execute(f"PRAGMA synchronous = {'FULL' if syncs else 'NORMAL'}")
        connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
        return Transaction(connection.execute, connection.executemany)

    def is_broken(self, connection: sqlite3.Connection) -> bool:
        return False

    def explained(self, error: Exception) -> StoreError | None:
        if isinstance(error, OSError):
            return StoreError("store_unreachable", f"the job store {self.place} cannot be made: {error.strerror}")
        if not isinstance(error, sqlite3.Error) or (code := primary(error)) not in REMEDIES:
            return None
        name, said = REMEDIES[code]
        return StoreError(name, f"the job store {self.place} {said} ({error})")

    def wall(self, transaction: Transaction) -> float:
        return time.time()

    def news(self, *, of_progress: bool = True) -> News:
        del of_progress
        return SqliteNews(self)


class SqliteNews(News):
    """Looks at the number that SQLite changes when another connection has committed."""

    def __init__(self, database: Sqlite) -> None:
        self._database, self._connection = database, database.connect()
        self._version = self._look()

    def wait(self, seconds: float, delay: float = AT_ONCE) -> bool:
        end = time.monotonic() + seconds
        while (version := self._look()) == self._version:
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(delay, left))
        self._version = version
        return True

    def close(self) -> None:
        self._connection.close()

    def _look(self) -> Any:
        with self._database.errors():
            return self._connection.execute("PRAGMA data_version").fetchone()[0]


def primary(error: sqlite3.Error) -> int | None:
    """The primary result code of an error, without what it says in particular."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
