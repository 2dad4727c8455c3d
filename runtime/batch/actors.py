"""Hands that are actors of Ray, on this machine or on all those of a cluster."""

import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import msgspec

from wanforge.configs.loading import Record
from wanforge.errors import BundleError, ResourceError
from wanforge.requirements import install_extra
from wanforge.runtime.batch.manifest import StoredClip
from wanforge.runtime.batch.orders import ClipOrder
from wanforge.runtime.batch.places import ACTOR, opened
from wanforge.runtime.batch.processes import LATENTS_FILE, VIDEO, Pools, stored
from wanforge.runtime.batch.team import LOOK_SECONDS, EndingError, FailedError, LostError
from wanforge.runtime.service.child.failures import failure_of
from wanforge.runtime.service.child.maker import Maker
from wanforge.runtime.service.child.messages import BundlePlace, MakeClip, SetUp
from wanforge.runtime.service.job import Failure
from wanforge.runtime.service.results.base import ObjectStorage

LOCAL, FOUND = "local", "auto"
"""The addresses that stand for a Ray of this command's own, and for the one that Ray finds."""
CONNECT_SECONDS = 10.0
SMALLEST_SHARE = 1e-4
"""The smallest part of a GPU that Ray knows."""


class ActorAnswer(Record, frozen=True):
    """What became of a clip in an actor: a stored clip, its latents, or a failure.

    Attributes:
        latents: The file of the latents, and `stages`, the seconds that they took.
        is_last: Whether the actor's process must not be used any more.
    """

    clip: StoredClip | None = None
    latents: bytes | None = None
    stages: dict[str, float] = msgspec.field(default_factory=dict)
    failure: Failure | None = None
    is_last: bool = False


class ClipActor:
    """What Ray runs in a process: a maker whose pipeline stays loaded. Messages are MessagePack.

    Args:
        setup: A `SetUp`.
        out: Where clips are stored, from this process's point of view.
    """

    def __init__(self, setup: bytes, out: str) -> None:
        self.setup = msgspec.msgpack.decode(setup, type=SetUp)
        self.out, self.name = out, f"{ACTOR}{os.getpid()}-{os.urandom(4).hex()}"
        with opened(out):  # which says at once why it cannot be, if so
            pass
        self.maker: Maker = import_module(self.setup.maker).create(self.setup)
        self.refused = self.maker.load(self.setup.bundles, lambda stage, percent: None)

    def ready(self) -> str:
        """Why it cannot make clips; empty if it can."""
        return next(iter(self.refused.values()), "")

    def make(self, message: bytes, given: bytes | None) -> bytes:
        """Do this actor's stage of the clip of a `ClipOrder`. Returns an `ActorAnswer`; `given` is that of the stage
        before."""
        order = msgspec.msgpack.decode(message, type=ClipOrder)
        before = ActorAnswer() if given is None else msgspec.msgpack.decode(given, type=ActorAnswer)
        try:
            with opened(self.out) as storage:  # its temporary files do not outlive the clip
                return msgspec.msgpack.encode(self._made(order, before, storage))
        except FailedError as error:
            return msgspec.msgpack.encode(ActorAnswer(failure=error.failure))
        except Exception as error:
            failure, is_last = failure_of(error)
            if failure.code in ("internal_error", "bundle_damaged"):  # nobody sees what an actor logs
                failure = Failure(failure.code, f"{type(error).__name__}: {error}")
            return msgspec.msgpack.encode(ActorAnswer(failure=failure, is_last=is_last))

    def _made(self, order: ClipOrder, before: ActorAnswer, storage: ObjectStorage) -> ActorAnswer:
        folder = storage.staging() / self.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if before.latents is not None:
            (folder / LATENTS_FILE).write_bytes(before.latents)
        try:
            bundle = self.setup.bundles[0].fingerprint
            message = MakeClip(order.key, bundle, order.request, order.image, str(folder))
            made = self.maker.make(message, lambda stage, percent: None)
            if VIDEO not in made.files:
                return ActorAnswer(latents=(folder / LATENTS_FILE).read_bytes(), stages=made.stages)
            return ActorAnswer(stored(storage, order, made, folder, before.stages))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


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
            self._actor = self.remote.remote(msgspec.msgpack.encode(self.setup), self.out)
            if refused := self._wait(self._actor.ready.remote(), ends):
                raise BundleError(refused)

    def make(self, order: ClipOrder, given: Any, ends: Event) -> Any:
        answer = self._wait(self._actor.make.remote(msgspec.msgpack.encode(order), given), ends)
        found = msgspec.msgpack.decode(answer, type=ActorAnswer)
        if found.is_last:
            self.close()
        if found.failure is not None:
            raise FailedError(found.failure)
        return answer if found.clip is None else found.clip

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
def connected(address: str, pools: Pools) -> Iterator[None]:
    """Be connected to Ray while the ``with`` block runs.

    Args:
        address: That of a cluster, ``auto`` for the one that Ray finds, or ``local`` to start one on this machine.
        pools: The actors that are to find room where it is started.

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
            own = {"num_cpus": max(processors, sum(pools.counts(pools.workers))), "include_dashboard": False}
        try:
            check_reachable(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, ValueError) as error:
            said = str(error).strip().splitlines()[0]
            raise ResourceError(
                f"there is no Ray at {address!r} ({said}); start one with `ray start --head`, or use --ray local"
            ) from None
    try:
        with redirect_stdout(sys.stderr):  # where Ray prints what it has to say, the report would not be JSON
            yield
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Check that something answers at the address of a cluster, because Ray ends the process where nothing does.

    Raises:
        OSError: Nothing does.
        ValueError: It is no address.
    """
    if address in (LOCAL, FOUND):
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    if not parts.hostname or not parts.port:
        raise ValueError("an address is HOST:PORT or ray://HOST:PORT")
    socket.create_connection((parts.hostname, parts.port), CONNECT_SECONDS).close()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Set the handlers of signals back that Ray replaces by its own, with which the command would not end in order."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def actor_hands(place: BundlePlace, backend: str, out: str, pools: Pools, most: int) -> list[list[ActorHand]]:
    """The hands of each stage, which share the GPUs or processors of the cluster equally. Only while Ray is connected.

    Args:
        most: The most hands of a stage that have something to do.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, machines = int(resources.get("GPU", 0)), sum(bool(node["Alive"]) for node in ray.nodes())
    counts = pools.counts(pools.workers or gpus or machines)
    sharers = -(-sum(counts) // (gpus or machines))
    processors = max(1, int(resources.get("CPU", 1)) // sum(counts))
    wanted: dict[str, Any] = {
        "num_cpus": processors,
        "num_gpus": SMALLEST_SHARE * int(1 / sharers / SMALLEST_SHARE) if gpus else 0,
    }
    remote = ray.remote(max_restarts=0, **wanted)(ClipActor)
    shared = out if "://" in out else str(Path(out).absolute())
    return [
        [
            ActorHand(remote, SetUp(maker, (place,), backend, threads=processors, sharers=sharers), shared)
            for _ in range(min(count, most))
        ]
        for count, maker in zip(counts, pools.makers, strict=True)
    ]
