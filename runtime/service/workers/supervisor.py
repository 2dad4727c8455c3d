"""The process that runs the workers of a machine, sweeps the job store and deletes old results.

It is started as ``python -m wanforge.runtime.service.workers.supervisor SETTINGS``, with the file of a `Supervision`
in JSON, and loads no PyTorch. SIGTERM and SIGINT end it: jobs that run may finish within `WorkTimes.grace`, after that
they are given back; a second signal gives them back at once. SIGHUP lets it read the file again and reload the bundles.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Event, Thread
from types import FrameType

import msgspec

from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError, WanforgeError, message_of
from wanforge.host.sole import sole
from wanforge.plugins.child_process import end_with
from wanforge.runtime.service import journal
from wanforge.runtime.service.catalogue import fingerprint
from wanforge.runtime.service.child.messages import BundlePlace
from wanforge.runtime.service.results.base import ObjectStorage, StorageError
from wanforge.runtime.service.results.opening import open_storage
from wanforge.runtime.service.results.sweeping import delete_orphans, delete_removable, delete_unfinished
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.base import JobStore, StoreError
from wanforge.runtime.service.store.sql_store import open_store
from wanforge.runtime.service.tracing.attempts import untraced
from wanforge.runtime.service.tracing.opening import open_tracer
from wanforge.runtime.service.workers.heart import Heart, Stop
from wanforge.runtime.service.workers.settings import Seat, Supervision, seats
from wanforge.runtime.service.workers.status import ServiceStatus, read_status, write_status
from wanforge.runtime.service.workers.worker import ClipWorker, Shop

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
STATUS_SECONDS = 1.0
SWEEP_END_SECONDS = 2.0
"""How long a sweep that runs may take when the service ends."""
OWN_SECONDS, SHARED_SECONDS = 60.0, 3600.0
"""How long nobody has to have served a bundle until its queued jobs fail: where this service alone uses the job store,
and where others may."""
STORE = "jobs.sqlite"


class Supervisor:
    """Runs workers until it is told to end.

    Args:
        path: The file of the settings, which `reload` reads again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = load_supervision(path)
        self.store: JobStore = store_of(self.settings.serve)
        self.storage: ObjectStorage = open_storage(self.settings.serve.results, self.settings.data)
        self.heart = Heart(self.store, self.settings.times)
        self.tracer = open_tracer()
        tell = untraced if self.tracer is None else self.tracer.tell
        self.shop = Shop(self.settings, self.store, self.storage, self.heart, Event(), Event(), tell)
        self.bundles: tuple[BundlePlace, ...] = ()
        self.workers: list[ClipWorker] = []
        self.problem = ""
        self._signals: list[int] = []
        self._ends_at: float | None = None
        self._due = dict.fromkeys(("sweep", "orphans"), 0.0)
        self._status_due = 0.0
        self._written: ServiceStatus | None = None

    def run(self) -> None:
        """Work until a signal ends it.

        Raises:
            ResourceError: Another supervisor works in this folder.
        """
        with sole_in(self.settings.data, "supervisor"), self._signals_noted():
            self._recover()
            self.bundles = places(self.settings.serve)
            taken = enumerate(seats(self.settings.serve.workers))
            self.workers = [self._worker(number, seat) for number, seat in taken]
            self._check_room()
            self.heart.start()
            sweeper = Thread(target=self._sweep_often, name="sweeps", daemon=True)
            sweeper.start()
            for worker in self.workers:
                worker.start()
            try:
                while any(worker.is_alive() for worker in self.workers):
                    self._tick()
                    time.sleep(TICK_SECONDS if not self._signals else 0)
            finally:
                self.shop.is_closed.set()
                self.shop.is_ended.set()
                self.heart.stop()
                sweeper.join(SWEEP_END_SECONDS)
                self._write_status()
                self.store.close()
                if self.tracer is not None:
                    self.tracer.close()

    def _worker(self, number: int, seat: Seat) -> ClipWorker:
        return ClipWorker(f"worker {number}" if not seat.gpu else f"gpu {seat.gpu}", self.shop, seat, self.bundles)

    def _recover(self) -> None:
        """Queue the jobs again that an earlier supervisor of this folder left, and delete the files of their clips. Its
        children ended with it."""
        before = read_status(self.settings.data)
        names = () if before is None else before.lease_names
        delete_unfinished(self.storage.staging(), names)
        if names:
            released = self.store.release(names, counts=True)
            log.info("Queued %d jobs again that an earlier supervisor left.", len(released))

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Take note of signals, which `_tick` acts upon."""

        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, before)  # a SIGHUP that came while this process started
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tick(self) -> None:
        """Do what is due."""
        while self._signals:
            self._obey(self._signals.pop(0))
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            for attempt in self.heart.attempts():
                attempt.end(Stop.SERVICE_ENDS)
            if time.monotonic() >= self._ends_at + 2 * self.settings.times.stop:
                self.shop.is_ended.set()
        self._write_if_changed()

    def _sweep_often(self) -> None:
        """Sweep whenever it is due. It is done in a thread, because storage that hangs may take minutes to say so."""
        times = self.settings.times
        while not self.shop.is_ended.wait(TICK_SECONDS):
            self._sometimes("sweep", times.sweep, self._sweep)
            self._sometimes("orphans", times.orphans, lambda: delete_orphans(self.storage, self.store))

    def _sometimes(self, what: str, seconds: float, do: Callable[[], object]) -> None:
        """Do something if it is due. Errors do not end the thread; it is tried again the next time."""
        if time.monotonic() < self._due[what]:
            return
        self._due[what] = time.monotonic() + seconds
        try:
            do()
        except (StorageError, StoreError) as error:
            log.warning("The %s was not finished: %s", what, error)
        except Exception:
            log.exception("The %s has failed.", what)

    def _sweep(self) -> None:
        self._check_room()
        self.store.sweep()
        served = [each.fingerprint for each in self.bundles]
        gone = self.store.fail_unserved(served, SHARED_SECONDS if self.settings.serve.store else OWN_SECONDS)
        if gone:
            log.warning("%d jobs have failed because nobody serves their bundles any more.", len(gone))
        delete_removable(self.storage, self.store)

    def _check_room(self) -> None:
        """Let no job start where its result would have no room."""
        try:
            self.storage.check_room()
            self.problem = ""
            self.shop.is_full.clear()
        except (StorageError, OSError) as error:
            self.problem = str(error)
            self.shop.is_full.set()

    def _obey(self, number: int) -> None:
        """Do what a signal asks for."""
        if number == signal.SIGHUP:
            self._reload()
            return
        is_first = not self.shop.is_closed.is_set()
        log.info("Ending; %s.", "running jobs may finish" if is_first else "running jobs are given back at once")
        self.shop.is_closed.set()
        self._ends_at = time.monotonic() + (self.settings.times.grace if is_first else 0)

    def _reload(self) -> None:
        """Serve the bundles that the settings now name, as they now are. Other settings need a new supervisor."""
        try:
            self.bundles = places(load_supervision(self.path).serve)
        except (WanforgeError, OSError) as error:
            log.error("The bundles stay as they are: %s", message_of(error))
            return
        for worker in self.workers:
            worker.reload(self.bundles)

    def _write_if_changed(self) -> None:
        """Write the status where it has changed or is getting old."""
        found, before = self._status(), self._written
        is_same = before is not None and msgspec.structs.replace(found, written=before.written) == before
        if not is_same or time.monotonic() >= self._status_due:
            self._write_status()

    def _write_status(self) -> None:
        self._written = self._status()
        self._status_due = time.monotonic() + STATUS_SECONDS
        try:
            write_status(self.settings.data, self._written)
        except OSError as error:
            log.warning("The status cannot be written: %s", error)

    def _status(self) -> ServiceStatus:
        return ServiceStatus(
            supervisor=os.getpid(),
            written=time.monotonic(),
            workers=tuple(worker.status for worker in self.workers),
            lease_names=tuple(worker.lease_name for worker in self.workers),
            problem=self.problem,
            bundles=tuple(each.fingerprint for each in self.bundles),
        )


def load_supervision(path: Path) -> Supervision:
    """Read the settings of a supervisor.

    Raises:
        ConfigError: The file is missing or is no `Supervision`.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Supervision)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: not the settings of a supervisor ({error})") from None


def places(settings: ServeSettings) -> tuple[BundlePlace, ...]:
    """The bundles of the settings with their fingerprints.

    Raises:
        BundleError: A folder is no bundle.
    """
    return tuple(
        BundlePlace(fingerprint(Bundle.open(Path(each.path))), each.path, each.loras) for each in settings.bundles
    )


def store_of(settings: ServeSettings) -> JobStore:
    """The job store of the settings.

    Raises:
        StoreError: It cannot be opened.
    """
    Path(settings.data).mkdir(mode=0o700, parents=True, exist_ok=True)
    return open_store(settings.store or Path(settings.data) / STORE, settings.policy)


def has_store(settings: ServeSettings) -> bool:
    """Whether there is a job store, as far as that shows without opening it."""
    return bool(settings.store) or (Path(settings.data) / STORE).exists()


def sole_in(data: Path, kind: str) -> AbstractContextManager[None]:
    """Be the only process of its kind in a folder, by the lock on a file there.

    Args:
        kind: What the process is: ``server`` or ``supervisor``.

    Raises:
        ResourceError: There is another one.
    """
    return sole(
        data / f"{kind}.lock",
        f"{data}: another {kind} works in this folder; end it, or give this service another folder (--data)",
    )


def main() -> None:
    """Run a supervisor with the settings that the first argument names. With a second one, the process that starts it,
    it ends when that process does."""
    if len(sys.argv) > 2:
        end_with(int(sys.argv[2]))
    journal.begin("text")
    try:
        supervisor = Supervisor(Path(sys.argv[1]))
        journal.begin(supervisor.settings.serve.logs)
        supervisor.run()
    except (WanforgeError, OSError) as error:
        log.error(message_of(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
