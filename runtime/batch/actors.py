"""Hands that are actors of Ray, on this machine or on all those of a cluster."""

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import msgspec

from wanforge.configs.loading import Record
from wanforge.errors import BundleError, ResourceError
from wanforge.requirements import install_extra
from wanforge.runtime.batch.crew import LOOK_SECONDS, EndingError, FailedError, LostError
from wanforge.runtime.batch.manifest import StoredClip
from wanforge.runtime.batch.orders import ClipOrder
from wanforge.runtime.batch.places import opened
from wanforge.runtime.batch.processes import MAKER, stored
from wanforge.runtime.service.child.failures import failure_of
from wanforge.runtime.service.child.messages import BundlePlace, MakeClip, SetUp
from wanforge.runtime.service.job import Failure

LOCAL = "local"
"""The address that stands for a Ray of this command's own."""


class ActorAnswer(Record, frozen=True):
    """What became of a clip in an actor: a stored clip or a failure.

    Attributes:
        is_last: Whether the actor's process must not be used any more.
    """

    clip: StoredClip | None = None
    failure: Failure | None = None
    is_last: bool = False


class ClipActor:
    """What Ray runs in a process: a maker whose pipeline stays loaded. Messages are JSON.

    Args:
        setup: A `SetUp`.
        out: Where clips are stored, from this process's point of view.
    """

    def __init__(self, setup: bytes, out: str) -> None:
        from wanforge.runtime.batch.maker import create  # here, because it loads PyTorch

        self.setup = msgspec.json.decode(setup, type=SetUp)
        self.storage = ExitStack().enter_context(opened(out))
        self.folder = self.storage.staging() / f"actor-{os.getpid()}-{os.urandom(4).hex()}"
        self.maker = create(self.setup)
        self.refused = self.maker.load(self.setup.bundles, lambda stage, percent: None)

    def ready(self) -> str:
        """Why it cannot make clips; empty if it can."""
        return next(iter(self.refused.values()), "")

    def make(self, message: bytes) -> bytes:
        """Make and store the clip of a `ClipOrder`. Returns an `ActorAnswer`."""
        order = msgspec.json.decode(message, type=ClipOrder)
        try:
            return msgspec.json.encode(ActorAnswer(self._made(order)))
        except Exception as error:
            failure, is_last = failure_of(error)
            if failure.code in ("internal_error", "bundle_damaged"):  # nobody sees what an actor logs
                failure = Failure(failure.code, f"{type(error).__name__}: {error}")
            return msgspec.json.encode(ActorAnswer(None, failure, is_last))

    def _made(self, order: ClipOrder) -> StoredClip:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            bundle = self.setup.bundles[0].fingerprint
            message = MakeClip(order.key, bundle, order.request, order.image, str(self.folder))
            made = self.maker.make(message, lambda stage, percent: None)
            return stored(self.storage, order, made, self.folder)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class ActorHand:
    """A hand with an actor, which is created again when it has died.

    Attributes:
        remote: The actor's class with the resources that it takes, as Ray wants it.
    """

    remote: Any
    setup: SetUp
    out: str
    _actor: Any = None

    def ready(self, ends: Event) -> None:
        if self._actor is None:
            self._actor = self.remote.remote(msgspec.json.encode(self.setup), self.out)
            if refused := self._wait(self._actor.ready.remote(), ends):
                raise BundleError(refused)

    def make(self, order: ClipOrder, given: Any, ends: Event) -> Any:
        answer = self._wait(self._actor.make.remote(msgspec.json.encode(order)), ends)
        found = msgspec.json.decode(answer, type=ActorAnswer)
        if found.is_last:
            self.close()
        if found.failure is not None:
            raise FailedError(found.failure)
        return found.clip

    def close(self) -> None:
        import ray

        actor, self._actor = self._actor, None
        if actor is not None:
            with suppress(Exception):  # it may have died, or all of Ray
                ray.kill(actor)

    def _wait(self, reference: Any, ends: Event) -> Any:
        """The result of a call, once it is there; an actor that waits for a machine of the cluster is not late.

        Raises:
            LostError: The actor has died.
            EndingError: The batch ends.
        """
        import ray

        while not ray.wait([reference], timeout=LOOK_SECONDS)[0]:
            if ends.is_set():
                raise EndingError
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            self.close()
            said = " ".join(str(error).split())
            raise LostError(f"Ray says: {said[:300]}") from None


@contextmanager
def connected(address: str, workers: int) -> Iterator[None]:
    """Be connected to Ray while the ``with`` block runs.

    Args:
        address: That of a cluster, ``auto`` for the one that Ray finds, or ``local`` to start one on this machine.
        workers: How many actors are to find room where one is started.

    Raises:
        ResourceError: Ray is not installed, or there is no cluster at the address.
    """
    with _handlers_kept():
        try:
            import ray
        except ImportError:
            raise ResourceError(f"--ray needs Ray, which is not installed; run: {install_extra('ray')}") from None
        own: dict[str, Any] = {}
        if address == LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            processors = len(os.sched_getaffinity(0))
            own = {"num_cpus": max(processors, workers), "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, ValueError) as error:
            said = str(error).strip().splitlines()[0]
            raise ResourceError(
                f"there is no Ray at {address!r} ({said}); start one with `ray start --head`, or use --ray local"
            ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Set the handlers of signals back that Ray replaces by its own, with which the command would not end in order."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def actor_hands(place: BundlePlace, backend: str, out: str, workers: int, most: int) -> list[ActorHand]:
    """A hand for each actor. Only while Ray is connected.

    Args:
        workers: Their number; 0 for one on each GPU of the cluster, or one on each machine if there are none.
        most: The most that have something to do.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, machines = int(resources.get("GPU", 0)), sum(bool(node["Alive"]) for node in ray.nodes())
    count = workers or gpus or machines
    processors = max(1, int(resources.get("CPU", 1)) // count)
    gpu_share = min(1.0, gpus / count) if gpus else 0.0
    sharers = max(1, -(-count // (gpus or machines)))
    remote = ray.remote(num_cpus=processors, num_gpus=gpu_share, max_restarts=0)(ClipActor)
    setup = SetUp(MAKER, (place,), backend, threads=processors, sharers=sharers)
    shared = out if "://" in out else str(Path(out).absolute())
    return [ActorHand(remote, setup, shared) for _ in range(min(count, most))]
