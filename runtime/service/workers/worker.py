"""A worker: a thread of the supervisor that has a child, claims jobs for it, and stores what it makes."""

import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread

import msgspec

from wanforge.runtime.service.catalogue import Asked
from wanforge.runtime.service.child.failures import failure_of
from wanforge.runtime.service.child.messages import (
    Advance,
    BundlePlace,
    ChildReady,
    ClipBegun,
    ClipFailed,
    ClipMade,
    ClipStopped,
    MakeClip,
    ReloadBundles,
    StopClip,
    ToSupervisor,
)
from wanforge.runtime.service.job import Failure, Job, Result
from wanforge.runtime.service.live.terms import LIVE
from wanforge.runtime.service.results.base import ObjectStorage, StorageError, new_name
from wanforge.runtime.service.results.previews import PREVIEW, STILL, preview_name
from wanforge.runtime.service.results.sweeping import staging_name
from wanforge.runtime.service.store.base import BundleShape, JobStore, News, Offer, StoreError
from wanforge.runtime.service.tracing.attempts import Tell, untraced
from wanforge.runtime.service.workers.breaker import Breaker
from wanforge.runtime.service.workers.heart import Attempt, Heart, Stop
from wanforge.runtime.service.workers.process import ChildProcess, EndedError
from wanforge.runtime.service.workers.settings import Seat, Supervision
from wanforge.runtime.service.workers.status import ClipKind, WorkerStatus

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""How often a worker that waits looks whether something else is to be done."""
IDLE_SECONDS = 1.0
"""How often a worker that waits asks the store for a job where it has no news: one that was left to others, say."""
STORE_SECONDS = 0.5
"""How long to wait before the store is asked again after an error."""
DISK_FULL, OUT_OF_MEMORY = "disk_full", "out_of_memory"
"""The codes of attempts that found no room for their files, and not enough memory."""
MOST_TRIES = 3
"""How often storing a result is tried where the storage cannot be reached."""


@dataclass(frozen=True)
class Shop:
    """What all workers share.

    Attributes:
        is_closed: Set when no more jobs are to be started: the service ends.
        is_ended: Set when the service does not even wait for the job store any more.
        trace: Called with every attempt that has ended.
        is_full: Set when no jobs are started because there is no room for what they make.
        idle: Bundles and shapes that idle workers have ready, by their lease names.
    """

    settings: Supervision
    store: JobStore
    storage: ObjectStorage
    heart: Heart
    is_closed: Event
    is_ended: Event
    trace: Tell = untraced
    is_full: Event = field(default_factory=Event)
    idle: dict[str, frozenset[BundleShape]] = field(default_factory=dict)


@dataclass(frozen=True)
class Killed:
    """The child of an attempt has ended, or had to be killed.

    Attributes:
        how: How it ended.
        has_begun: Whether it had begun the clip before.
        was_hung: Whether it was killed because there was no progress.
        was_asked: Whether it was killed because it did not stop when it was asked to.
    """

    how: str
    has_begun: bool = True
    was_hung: bool = False
    was_asked: bool = False


Outcome = ClipMade | ClipFailed | ClipStopped | Killed


class ClipWorker(Thread):
    """Serves one job after the other, with one child after the other. A clip is stored in another thread, while the
    child makes the next one.

    Args:
        name: What people call it.
        bundles: The bundles that it serves.

    Attributes:
        status: What it does.
        lease_name: The name under which its child's leases are held.
    """

    def __init__(self, name: str, shop: Shop, seat: Seat, bundles: Sequence[BundlePlace]) -> None:
        super().__init__(name=name, daemon=True)
        self.shop, self.seat, self.bundles = shop, seat, tuple(bundles)
        self.times = shop.settings.times
        self.breaker = Breaker(shop.settings)
        self.status = WorkerStatus(name=name)
        self.lease_name = ""
        self._warm: dict[str, str] = {}
        self._child: ChildProcess | None = None
        self._reloading: tuple[BundlePlace, ...] | None = None
        self._asks_at = 0.0
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._telling = Lock()
        self._storing = ThreadPoolExecutor(1, thread_name_prefix=f"{name} stores")
        self._stored: Future[None] | None = None

    def run(self) -> None:
        self._stored = self._storing.submit(lambda: None)  # so that no thread has to be started later
        try:
            while not self.shop.is_closed.is_set():
                try:
                    with closing(self.shop.store.news(of_progress=False)) as news:
                        while not self.shop.is_closed.is_set():
                            self._turn(news)
                except StoreError as error:
                    log.warning("%s cannot use the job store: %s", self.name, error)
                    self.shop.is_closed.wait(STORE_SECONDS)
                except EndedError as error:
                    self._lose_child(str(error))
                except Exception as error:
                    log.exception("%s has failed.", self.name)
                    self._lose_child(f"the supervisor failed ({type(error).__name__})")
        finally:
            self._storing.shutdown()
            if self._child is not None:
                self._child.end()
            self._tell(state="ended", reason="the service ends", child=None)

    def reload(self, bundles: Sequence[BundlePlace]) -> None:
        """Serve these bundles, from the next job on."""
        self._reloading = tuple(bundles)
        self.breaker.reset()

    def wake(self) -> None:
        """Let the thread look what is to be done."""
        os.eventfd_write(self._woken, 1)

    def _turn(self, news: News) -> None:
        """Do what is to be done next."""
        if self._reloading is not None:
            self.bundles, self._reloading = self._reloading, None
            if self._child is not None:
                self._child.send(ReloadBundles(self.bundles))
                self._await_ready(self._child)
        if self._child is None:
            self._start()
            return
        self._child.receive(0)  # which notices if it has ended
        is_due = not self.shop.is_full.is_set() and time.monotonic() >= self._asks_at
        job = self._claim() if is_due else None
        if job is not None:
            self.shop.idle.pop(self.lease_name, None)
            self._serve(job, self._child)
            self._asks_at = 0.0
        else:
            self._asks_at = time.monotonic() + IDLE_SECONDS if is_due else self._asks_at
            self.shop.idle[self.lease_name] = frozenset(self._warm.items())
            if news.wait(LOOK_SECONDS):
                self._asks_at = 0.0

    def _claim(self) -> Job | None:
        served = [each.fingerprint for each in self.bundles if each.fingerprint not in self.status.refused]
        warm = tuple(self._warm.items())
        left = frozenset[BundleShape]().union(*self.shop.idle.copy().values()).difference(warm)
        return self.shop.store.claim(Offer(self.lease_name, tuple(served), warm, tuple(left))) if served else None

    def _start(self) -> None:
        """Start a child, unless it has to wait."""
        if (left := self.breaker.seconds_left) > 0:
            self._tell(state="broken" if self.breaker.is_open else "waiting")
            self.shop.is_closed.wait(min(left, LOOK_SECONDS))
            return
        self._await_stored()  # because its job is leased by the name of the child that has made it
        self.lease_name = f"{socket.gethostname()}/{self.name}/{secrets.token_hex(8)}"
        self._tell(state="starting", reason="its bundles are being loaded")
        child = self._child = ChildProcess(self.shop.settings, self.seat, self.bundles)
        self._tell(child=child.pid)
        self._await_ready(child)

    def _await_ready(self, child: ChildProcess) -> None:
        """Wait until a child has loaded its bundles.

        Raises:
            EndedError: It has ended, or had to be.
        """
        self.shop.idle.pop(self.lease_name, None)
        self._warm, heard_at = {}, time.monotonic()
        while not isinstance(message := child.receive(LOOK_SECONDS), ChildReady):
            heard_at = time.monotonic() if message is not None else heard_at
            if time.monotonic() - heard_at > self.times.load:
                raise EndedError(f"loading made no progress for {self.times.load:g} s")
            if self.shop.is_closed.is_set():
                return
        refused = message.refused
        for reason in refused.values():
            log.error("%s cannot serve a bundle: %s", self.name, reason)
        if refused and len(refused) == len(self.bundles):
            self._tell(refused=refused)
            raise EndedError(next(iter(refused.values())))
        self._warm = message.warm
        self._tell(state="idle", reason="", loaded=message.loaded, usage=message.usage, refused=refused)

    def _lose_child(self, how: str, *, counts: bool = True) -> None:
        """Clean up after a child that has ended.

        Args:
            counts: Whether something is wrong with it.
        """
        log.error("%s has lost its process: %s.", self.name, how)
        if self._child is not None:
            self._child.kill()
        self._child, self._warm = None, {}
        self.shop.idle.pop(self.lease_name, None)
        if counts:
            self.breaker.died(how)
        reason = self.breaker.reason or how
        self._tell(state="waiting", reason=reason, child=None, loaded=(), restarts=self.status.restarts + 1)

    def _serve(self, job: Job, child: ChildProcess) -> None:
        """Make the clip of a job, and settle what becomes of the job."""
        name = staging_name(self.lease_name, f"{job.id}-{job.attempt}")
        attempt = Attempt(job, self.wake, self.shop.storage.staging() / name)
        self._tell(state="working", job=job.id)
        self.shop.heart.add(attempt)
        try:
            attempt.folder.mkdir(parents=True, exist_ok=True)
            outcome = self._make(attempt, child)
        except OSError as error:
            log.exception("%s cannot use its folder.", self.name)
            outcome = ClipFailed(attempt.ticket, failure_of(error).failure, False)
        except Exception as error:
            log.exception("%s has failed.", self.name)
            outcome = Killed(f"the supervisor failed ({type(error).__name__})")
            self._lose_child(outcome.how)
        self._await_stored()  # so that no more than one clip waits to be stored
        self._stored = self._storing.submit(self._finish, attempt, outcome)
        if not isinstance(outcome, ClipMade):
            self._await_stored()
        self._tell(job=None, **({} if self._child is None else {"state": "idle"}))

    def _await_stored(self) -> None:
        """Wait until the clip that was made last is stored, or cannot be."""
        wait([] if self._stored is None else [self._stored])

    def _finish(self, attempt: Attempt, outcome: Outcome) -> None:
        """Settle what becomes of a job, and delete the files of the attempt."""
        try:
            self._settle(attempt, outcome)
        except Exception:  # the lease of the job runs out
            log.exception("%s cannot settle %s.", self.name, attempt.job.id)
        finally:
            self.shop.heart.remove(attempt)
            self._discard(attempt.previews)
            shutil.rmtree(attempt.folder, ignore_errors=True)
            self.shop.trace(attempt.traced)

    def _make(self, attempt: Attempt, child: ChildProcess) -> Outcome:
        """Let the child make a clip, and watch it."""
        job = attempt.job
        try:
            asked = Asked.of(job)
            image, before = self._local(asked.image), self._local(asked.continues)
        except StorageError as error:
            return ClipFailed(attempt.ticket, Failure(error.code, str(error)), False)
        except msgspec.ValidationError as error:
            said = f"the request is not one of this version ({error}); submit it again"
            return ClipFailed(attempt.ticket, Failure("invalid_request", said), False)
        self._warm.pop(job.bundle, None)  # what a bundle has recorded is of one shape, and goes for the next one's
        prompt = {"prompt": asked.prompt} if self.shop.settings.serve.logs_prompts else {}
        log.info("%s begins %s.", self.name, job.id, extra={"job": job.id, "attempt": job.attempt, **prompt})
        service, folder = str(self.shop.settings.data), str(attempt.folder)
        child.send(MakeClip(attempt.ticket, job.bundle, job.request, image, folder, service, before))
        try:
            outcome = self._watch(attempt, child)
        except EndedError as error:
            outcome = Killed(str(error), has_begun=attempt.has_begun)
        match outcome:
            case ClipMade(loaded=loaded, usage=usage):
                self.breaker.succeeded()
                self._tell(loaded=loaded, usage=usage)
                self._warm = {bundle: shape for bundle, shape in self._warm.items() if bundle in loaded}
                self._warm[job.bundle] = job.shape
            case Killed(how, was_asked=was_asked):
                self._lose_child(how, counts=not was_asked)
            case ClipFailed(_, failure, is_last=True):
                # A clip that is too large says nothing of the worker. If there is not even memory for its bundles, no
                # child gets ready, and that counts.
                self._lose_child(failure.message, counts=failure.code != OUT_OF_MEMORY)
        return outcome

    def _local(self, name: str | None) -> str | None:
        """The file of an object that a job reads.

        Raises:
            StorageError: It is gone, or the storage cannot be reached.
        """
        return None if name is None else str(self.shop.storage.local(name))

    def _watch(self, attempt: Attempt, child: ChildProcess) -> Outcome:
        """Wait for the end of an attempt.

        Raises:
            EndedError: The child has ended.
        """
        stop_until = None
        while True:
            if attempt.stop is not None and stop_until is None:
                stop_until = time.monotonic() + self.times.stop
                child.send(StopClip(attempt.ticket))
            message = child.receive(LOOK_SECONDS, [self._woken])
            with suppress(BlockingIOError):
                os.eventfd_read(self._woken)
            if (outcome := self._heard(attempt, message)) is not None:
                return outcome
            if stop_until is not None and time.monotonic() > stop_until:
                return Killed(f"it did not stop within {self.times.stop:g} s", was_asked=True)
            if time.monotonic() - attempt.moved_at > self.times.hang:
                return Killed(f"it made no progress for {self.times.hang:g} s", attempt.has_begun, was_hung=True)

    def _heard(self, attempt: Attempt, message: ToSupervisor | None) -> Outcome | None:
        """Take a message of the child; return it if it ends the attempt."""
        match message:
            case ClipBegun(ticket) if ticket == attempt.ticket:
                attempt.has_begun = True
            case Advance(ticket, stage, percent) if ticket == attempt.ticket:
                if stage.startswith(PREVIEW):
                    self._show(attempt, int(stage.removeprefix(PREVIEW)))
                attempt.advance(stage, percent)
            case ClipMade() | ClipFailed() | ClipStopped() if message.ticket == attempt.ticket:
                return message
        return None

    def _show(self, attempt: Attempt, step: int) -> None:
        """Store the picture of what a step predicts. The clip goes on without it if it cannot be stored."""
        name = preview_name(attempt.job, step)
        with suppress(StorageError, OSError):
            self.shop.storage.put(name, (attempt.folder / STILL).read_bytes())
            attempt.previews.append(name)

    def _settle(self, attempt: Attempt, outcome: Outcome) -> None:
        """Tell the store what became of an attempt."""
        match outcome:
            case ClipMade():
                self._complete(attempt, outcome)
            case ClipFailed(_, failure, _):
                self._reject(attempt, failure)
            case Killed(has_begun=False):
                self._give_back(attempt, has_begun=False)
            case ClipStopped() | Killed(was_asked=True):
                self._give_back(attempt)
            case Killed(_, was_hung=True):
                self._lose(attempt, Failure("worker_hung", f"the clip was given up: {outcome.how}"))
            case Killed():
                self._lose(attempt, None)

    def _complete(self, attempt: Attempt, made: ClipMade) -> None:
        """Store the files of a clip and complete its job."""
        attempt.traced.note_made(made)
        objects = {variant: new_name(Path(file).suffix) for variant, file in made.files.items()}
        try:
            with ThreadPoolExecutor(len(objects)) as pool:  # a disk syncs several files in the time of one
                list(pool.map(self._store, objects.values(), [attempt.folder / file for file in made.files.values()]))
        except StorageError as error:
            self._discard(objects.values())
            self._reject(attempt, Failure(error.code, str(error)))
            return
        job, result = attempt.job, Result(objects=objects, backend=made.backend, details=made.details)
        is_done = self._surely(lambda: self.shop.store.complete(job.lease, result))
        if not is_done:
            if is_done is False:
                self._discard(objects.values())
            return
        self._count(attempt, "completed")
        self._change(lambda status: status.with_times(kind_of(job), made.stages))
        self._tell(last_good_at=time.time())
        log.info("%s completed %s.", self.name, job.id, extra={"job": job.id, "seconds": made.stages})

    def _store(self, name: str, path: Path) -> None:
        """Store a file, trying again where the storage cannot be reached.

        Raises:
            StorageError: It cannot be stored.
        """
        for tries in range(MOST_TRIES):
            try:
                self.shop.storage.add(name, path)
                return
            except StorageError as error:
                if error.code != "storage_unreachable" or tries + 1 == MOST_TRIES:
                    raise
                time.sleep(STORE_SECONDS * 2**tries)

    def _discard(self, objects: Collection[str]) -> None:
        """Delete objects that no job will have. If that fails, they are found as orphans."""
        with suppress(StorageError):
            self.shop.storage.delete(objects)

    def _reject(self, attempt: Attempt, failure: Failure) -> None:
        """End an attempt that failed. A full disk is not the job's fault: it waits for room with the others, and fails
        if there is not enough the next time."""
        if failure.code == DISK_FULL:
            self.shop.is_full.set()
            self._lose(attempt, failure)
        else:
            self._fail(attempt, failure)

    def _fail(self, attempt: Attempt, failure: Failure) -> None:
        job = attempt.job
        if self._surely(lambda: self.shop.store.fail(job.lease, failure)):
            self._count(attempt, failure.code)
            log.warning("%s failed (%s): %s", job.id, failure.code, failure.message, extra={"job": job.id})

    def _give_back(self, attempt: Attempt, *, has_begun: bool = True) -> None:
        """End an attempt that was stopped: cancelled, if that is why, or else as if it had not begun. A stream that
        has begun fails, as in `_lose`."""
        lease = attempt.job.lease
        if attempt.stop is Stop.LEASE_LOST:
            return
        if self._surely(lambda: self.shop.store.stopped(lease)):
            self._count(attempt, "cancelled")
        elif has_begun and attempt.job.shape == LIVE:
            self._fail(attempt, Failure("worker_died", "the server ended while this stream was made; start anew"))
        elif self._surely(lambda: self.shop.store.requeue(lease, counts=False)):
            self._count(attempt, "requeued")

    def _lose(self, attempt: Attempt, last: Failure | None) -> None:
        """End an attempt that was lost: the job is queued again, or fails if that has happened often enough.

        Args:
            last: The failure after the last attempt; None for the store's own.
        """
        job, most = attempt.job, self.shop.settings.serve.policy.most_lost
        if job.shape == LIVE:  # whoever watches has seen a part of it, which another attempt would not go on from
            self._fail(
                attempt, last or Failure("worker_died", "the process that made this stream has died; start anew")
            )
        elif last is not None and job.lost + 1 >= most and attempt.stop is None:
            self._fail(attempt, last)
        elif self._surely(lambda: self.shop.store.requeue(job.lease, counts=True)):
            self._count(attempt, "worker_died" if last is None else last.code)

    def _count(self, attempt: Attempt, outcome: str) -> None:
        """Note how an attempt ended."""
        attempt.traced.outcome = outcome
        self._change(lambda status: status.with_outcome(outcome))

    def _surely(self, change: Callable[[], bool]) -> bool | None:
        """Make a change in the store, and try again for as long as the store cannot be used. Until then the lease runs
        on; if it runs out, the change has no effect.

        Returns:
            Whether the change was made; None if the service ends before that is known.
        """
        while True:
            try:
                return change()
            except StoreError as error:
                log.warning("%s waits for the job store: %s", self.name, error)
                if self.shop.is_ended.wait(STORE_SECONDS):
                    return None

    def _tell(self, **changes: object) -> None:
        """Change what the status says."""
        self._change(lambda status: msgspec.structs.replace(status, **changes))

    def _change(self, change: Callable[[WorkerStatus], WorkerStatus]) -> None:
        """Change the status, which two threads do."""
        with self._telling:
            self.status = change(self.status)


def kind_of(job: Job) -> ClipKind:
    """The kind of a job's clip."""
    asked = Asked.of(job)
    size = LIVE if asked.live else f"{asked.width_px}x{asked.height_px}"  # a stream takes as long as it is watched
    return ClipKind(asked.model, size, asked.recipe)
