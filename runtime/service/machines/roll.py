"""The list of the machines whose workers share a job store.

Each machine notes in the database what its supervisor tells (`workers.status`), every few seconds and whenever a worker
becomes able or unable to take jobs. It is no part of the queue: nobody is woken by it, and if it is wrong, no job is
lost by that.
"""

import time

import msgspec

from wanforge.configs.loading import Record
from wanforge.runtime.service.store.base import JobStore
from wanforge.runtime.service.store.databases.database import Database
from wanforge.runtime.service.store.sql_store import SqlStore
from wanforge.runtime.service.workers.status import ServiceStatus

FORGET_SECONDS = 600.0
"""How long a machine is listed after it was last heard of."""
OTHER_VERSION = "its wanforge is of another version, so nothing is known of its workers"


class Member(Record, frozen=True):
    """A machine, as it was last heard of.

    Attributes:
        seconds: How long ago its supervisor has written the status.
    """

    name: str
    seconds: float
    status: ServiceStatus


class Roll:
    """The machines of a job store, by their names. Times are those of the database's clock, which all of them share."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def of(cls, store: JobStore) -> "Roll":
        """The list beside a job store."""
        assert isinstance(store, SqlStore)
        return cls(store.database)

    def note(self, machine: str, status: ServiceStatus) -> None:
        """Note what a machine tells, and forget those that were not heard of for long.

        Raises:
            StoreError: The database cannot be used.
        """
        age = max(0.0, time.monotonic() - status.written)
        with self.database.aside() as transaction:
            wall = self.database.wall(transaction)
            transaction.run(
                "INSERT INTO machines (name, seen, status) VALUES (:name, :seen, :status) "
                "ON CONFLICT (name) DO UPDATE SET seen = excluded.seen, status = excluded.status",
                name=machine,
                seen=wall - age,
                status=msgspec.json.encode(status).decode(),
            )
            transaction.run("DELETE FROM machines WHERE seen < :before", before=wall - FORGET_SECONDS)

    def leave(self, machine: str) -> None:
        """Forget a machine, which ends in good order.

        Raises:
            StoreError: The database cannot be used.
        """
        with self.database.aside() as transaction:
            transaction.run("DELETE FROM machines WHERE name = :name", name=machine)

    def machines(self) -> list[Member]:
        """All machines that were heard of within `FORGET_SECONDS`, in the order of their names.

        Raises:
            StoreError: The database cannot be used.
        """
        with self.database.read() as transaction:
            wall = self.database.wall(transaction)
            rows = transaction.rows("SELECT name, seen, status FROM machines ORDER BY name")
        found = [Member(row["name"], max(0.0, wall - row["seen"]), decoded(row["status"])) for row in rows]
        return [each for each in found if each.seconds < FORGET_SECONDS]


def decoded(text: str) -> ServiceStatus:
    """A status as a machine has noted it. One of another version is a problem of that machine alone."""
    try:
        return msgspec.json.decode(text, type=ServiceStatus)
    except msgspec.DecodeError:
        return ServiceStatus(supervisor=0, written=0.0, workers=(), problem=OTHER_VERSION)
