"""What a service does with its store, in a process that is killed before one of its statements.

``python -m tests.runtime.service.store.crash PLACE NUMBER`` kills itself before the statement of that number, counted
from 1. It prints each thing that the store has confirmed, and in the end the number of statements.
"""

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from tests.runtime.service.store.rig import claimed, result, submission
from wanforge.runtime.service.job import Failure, Idempotency
from wanforge.runtime.service.store.databases.database import Transaction
from wanforge.runtime.service.store.sql_store import SqlStore, open_store


class Countdown:
    """Counts the statements of a store, and kills this process before one of them."""

    def __init__(self, store: SqlStore, last: int) -> None:
        self.count, self._last = 0, last
        self._begin = store.database.begin
        store.database.begin = self.begin  # type: ignore[method-assign]

    def begin(self, connection: Any, *, writes: bool, syncs: bool = True) -> Transaction:
        transaction = self._begin(connection, writes=writes, syncs=syncs)
        execute, execute_many = transaction._execute, transaction._execute_many

        def counted(statement: str, values: Mapping[str, Any]) -> Any:
            self._step()
            return execute(statement, values)

        def counted_many(statement: str, values: Any) -> Any:
            self._step()
            return execute_many(statement, values)

        return Transaction(counted, counted_many)

    def _step(self) -> None:
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def confirm(what: str, name: str) -> None:
    print(what, name, flush=True)


def live(store: SqlStore) -> None:
    """One of everything that happens to jobs."""
    for key in (f"{os.getpid()}-{number}" for number in range(3)):
        job = store.submit(submission(objects=(f"{key}.png",), idempotency=Idempotency(key, key))).job
        confirm("submitted", job.id)
    batch = store.submit_batch([submission("bob", refused=Failure("bad", "bad")), *[submission("bob")] * 3])
    confirm("batch", batch.id)
    done = claimed(store)
    store.heartbeat(done.lease, "denoise", 10)
    store.complete(done.lease, result("done"))
    confirm("completed", done.id)
    back = claimed(store)
    store.requeue(back.lease, counts=True)
    for _ in range(2):
        claimed(store, "w2")
    store.release(["w2"], counts=False)
    failed = claimed(store)
    store.fail(failed.lease, Failure("bad", "bad"))
    confirm("failed", failed.id)
    store.delete(failed.id)
    confirm("deleted", failed.id)
    cancelled = claimed(store)
    store.cancel(cancelled.id)
    store.stopped(cancelled.lease)
    confirm("cancelled", cancelled.id)
    store.sweep()


if __name__ == "__main__":
    opened = open_store(sys.argv[1])
    assert isinstance(opened, SqlStore)
    countdown = Countdown(opened, int(sys.argv[2]))
    live(opened)
    opened.close()
    print("statements", countdown.count)
