"""Transactions of a database, whichever it is. Statements name their values: ``WHERE id = :job``."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from wanforge.runtime.service.store.base import News, StoreError, TurnedAwayError
from wanforge.runtime.service.store.databases.clock import StoreTime

Row = Mapping[str, Any]

SURROGATES = re.compile("[\ud800-\udfff]")
INHERITED: list[Any] = []
"""Connections of parent processes. Neither database allows a child to use or close them, so they are kept from the
garbage collector."""


class Transaction:
    """The statements of one transaction, and its time.

    Attributes:
        changes: The number of rows that it has written.
    """

    def __init__(
        self, execute: Callable[[str, Mapping[str, Any]], Any], execute_many: Callable[[str, Any], Any]
    ) -> None:
        self._execute, self._execute_many = execute, execute_many
        self.time = StoreTime(0.0, 0.0, 0.0)
        self.changes = 0

    @property
    def now(self) -> float:
        """Seconds since 1970."""
        return self.time.wall

    def run(self, statement: str, **values: Any) -> int:
        """Run a statement that writes. Returns the number of rows that it wrote."""
        count = max(0, self._execute(statement, checked(values)).rowcount)
        self.changes += count
        return count

    def run_many(self, statement: str, values: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement that writes once for each of some sets of values."""
        if values:
            self._execute_many(statement, [checked(each) for each in values])
            self.changes += len(values)

    def rows(self, statement: str, **values: Any) -> list[Row]:
        """The rows that a query gives."""
        return self._execute(statement, checked(values)).fetchall()

    def row(self, statement: str, **values: Any) -> Row | None:
        """The first row that a query gives."""
        return self._execute(statement, checked(values)).fetchone()

    def number(self, statement: str, **values: Any) -> int:
        """The number that a query gives in its column ``n``."""
        found = self.row(statement, **values)
        return int(found["n"]) if found else 0

    def count_up(self, column: str, by: int = 1) -> int:
        """Count a number of the clock's row up, and return what it was before."""
        self.run(f"UPDATE clock SET {column} = {column} + :by", by=by)
        return self.number(f"SELECT {column} AS n FROM clock") - by


def checked(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Values that any database can store, or compare with what it has.

    Raises:
        TurnedAwayError: There is a text with a NUL, or with half of a surrogate pair.
    """
    for name, value in values.items():
        if isinstance(value, str) and ("\0" in value or SURROGATES.search(value)):
            raise TurnedAwayError(
                "bad_text", f"{name} is {value!r}, which is no text; use characters of Unicode, no NUL"
            )
    return values


def listed(values: Collection[Any], prefix: str = "v") -> tuple[str, dict[str, Any]]:
    """A list for ``IN``, and the values that it names."""
    named = {f"{prefix}{place}": value for place, value in enumerate(values)}
    return "(" + (", ".join(f":{name}" for name in named) or "NULL") + ")", named


class Database(ABC):
    """A database with a pool of connections, each of which is used by one thread at a time.

    Attributes:
        place: Where it is, for messages; no password is in it.
        answers_at_once: Whether a row is read without asking another process.
    """

    answers_at_once = False

    def __init__(self, place: str, clock: Callable[[], float] | None) -> None:
        self.place = place
        self._clock = clock
        self._idle: list[Any] = []
        self._process = os.getpid()

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A transaction that sees the database as it is at one moment."""
        with self._transaction(writes=False) as transaction:
            yield transaction

    @contextmanager
    def write(self, *, syncs: bool = True) -> Iterator[Transaction]:
        """A transaction that writes. It waits until no other one does.

        Args:
            syncs: Whether it outlives a power cut once it has ended, rather than once a later one that syncs has.
        """
        with self._transaction(writes=True, syncs=syncs) as transaction:
            before, transaction.time = self._times(transaction)
            yield transaction
            if transaction.changes or transaction.time.is_worth_writing(before):
                time = transaction.time
                statement = "UPDATE clock SET wall = :wall, running = :running, settled = :settled"
                transaction.run(statement, wall=time.wall, running=time.running, settled=time.settled)
                self.announce(transaction, is_progress=not syncs)

    @contextmanager
    def aside(self) -> Iterator[Transaction]:
        """A transaction that writes something in which no job has a part, so that nobody who waits for news is told of
        it. It waits until no other one writes."""
        with self._transaction(writes=True, syncs=False) as transaction:
            yield transaction

    def prepare(self, migrate: Callable[[Transaction, str], None]) -> None:
        """Bring the tables to the present version."""
        try:
            with self._transaction(writes=True) as transaction:
                migrate(transaction, self.place)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections of this process that are not in use."""
        self._forget_parent()
        while self._idle:
            self._idle.pop().close()

    @abstractmethod
    def news(self, *, of_progress: bool = True) -> News:
        """What tells of changes; without those of progress alone, where the database can tell them apart."""

    @abstractmethod
    def connect(self) -> Any:
        """A new connection."""

    @abstractmethod
    def begin(self, connection: Any, *, writes: bool, syncs: bool = True) -> Transaction:
        """Begin a transaction. One that writes waits until no other one does. See `write` for `syncs`."""

    @abstractmethod
    def is_broken(self, connection: Any) -> bool:
        """Whether a connection can no longer be used."""

    @abstractmethod
    def explained(self, error: Exception) -> StoreError | None:
        """The message for an error of the database's library; None for other errors."""

    @abstractmethod
    def wall(self, transaction: Transaction) -> float:
        """Seconds since 1970, by the clock that all processes share."""

    def announce(self, transaction: Transaction, *, is_progress: bool) -> None:
        """Tell of a change, where the database does not do so by itself."""
        del transaction, is_progress

    @contextmanager
    def _transaction(self, *, writes: bool, syncs: bool = True) -> Iterator[Transaction]:
        with self.errors():
            connection, transaction = self._begin(writes=writes, syncs=syncs)
        is_done = False
        try:
            with self.errors():
                yield transaction
            with self.errors(is_unknown=writes):
                connection.commit()
            is_done = True
        finally:
            self._give_back(connection, is_done=is_done)

    def _begin(self, *, writes: bool, syncs: bool) -> tuple[Any, Transaction]:
        """Begin on an idle connection, or on a new one if there is none or it broke while it was idle."""
        self._forget_parent()
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            try:
                return connection, self.begin(connection, writes=writes, syncs=syncs)
            except Exception:
                if not self.is_broken(connection):
                    self._give_back(connection, is_done=False)
                    raise
                connection.close()
        connection = self.connect()
        try:
            return connection, self.begin(connection, writes=writes, syncs=syncs)
        except BaseException:
            connection.close()
            raise

    def _give_back(self, connection: Any, *, is_done: bool) -> None:
        """Keep a connection for the next transaction, without what this one has not committed."""
        try:
            if not is_done:
                connection.rollback()
        except Exception:  # the connection is broken, and the database rolls back by itself
            connection.close()
        else:
            self._idle.append(connection)

    def _forget_parent(self) -> None:
        if self._process != os.getpid():
            INHERITED.append(self._idle)
            self._idle, self._process = [], os.getpid()

    def _times(self, transaction: Transaction) -> tuple[StoreTime, StoreTime]:
        """The time of the last transaction that wrote it, and the time now."""
        row = transaction.row("SELECT wall, running, settled FROM clock")
        assert row is not None
        before = StoreTime(row["wall"], row["running"], row["settled"])
        return before, before.at(self._clock() if self._clock else self.wall(transaction))

    @contextmanager
    def errors(self, *, is_unknown: bool = False) -> Iterator[None]:
        """Turn errors of the database's library into those of the store."""
        try:
            yield
        except Exception as error:
            found = self.explained(error)
            if found is None:
                raise
            found.is_unknown = is_unknown and found.code == "store_unreachable"
            raise found from error
