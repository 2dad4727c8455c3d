"""What a machine tells the others of its workers, for as long as they run."""

import hashlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wanforge.runtime.service.machines.roll import Roll
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.base import JobStore, StoreError
from wanforge.runtime.service.workers.status import READY, read_status

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
NOTE_SECONDS = 5.0
"""How often something is noted where nothing has changed."""


def machine_name(data: Path) -> str:
    """What a machine is called in the list: its host, and a part of a hash, since several services may run on one host.
    It is the same after a restart."""
    return f"{socket.gethostname()}-{hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:6]}"


@contextmanager
def reported(settings: ServeSettings, store: JobStore) -> Iterator[None]:
    """Note what the workers of this machine do while the block runs, if there are any and other machines share their
    job store."""
    if settings.role == "api" or not settings.store:
        yield
        return
    name, ends = machine_name(Path(settings.data)), threading.Event()
    roll = Roll.of(store)
    thread = threading.Thread(target=_report, args=(roll, name, Path(settings.data), ends), name="report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()
        with suppress(StoreError):  # it is forgotten soon
            roll.leave(name)


def _report(roll: Roll, name: str, data: Path, ends: threading.Event) -> None:
    told: tuple[bool, ...] | None = None
    due = 0.0
    while not ends.wait(LOOK_SECONDS):
        status = read_status(data)
        if status is None:
            continue
        able = tuple(worker.state in READY and not status.problem for worker in status.workers)
        if able == told and time.monotonic() < due:
            continue
        due = time.monotonic() + NOTE_SECONDS
        try:
            roll.note(name, status)
            told = able
        except StoreError as error:
            log.warning("Other machines are told nothing of the workers of this one: %s", error)
        except Exception:  # without this thread, they would count as lost
            log.exception("Telling other machines of the workers of this one has failed.")
