"""What the supervisor and a child tell each other: records in MessagePack, over pipes, never pickled objects."""

import os
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from threading import Lock
from typing import Any, Generic, TypeVar

import msgspec

from wanforge.configs.loading import Record
from wanforge.runtime.service.job import Failure
from wanforge.runtime.service.journal import Style

MOST_BYTES = 1 << 24
"""The largest message. Clips are files, so messages are small."""


class BundlePlace(Record, frozen=True):
    """A bundle that is served: its fingerprint, its folder, and its LoRAs as the settings name them."""

    fingerprint: str
    root: str
    loras: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)


class SetUp(Record, frozen=True, tag=True):
    """The first message to a child.

    Attributes:
        maker: The module that makes clips; its function ``create`` takes this message and returns a `Maker`.
        backend: The backend of requests that name none.
        memory_bytes: How much the loaded bundles may take; None for its part of what is free at the start.
        threads: The number of processors that it may use.
        logs: How it logs.
        sharers: How many children share the memory.
    """

    maker: str
    bundles: tuple[BundlePlace, ...]
    backend: str = "auto"
    memory_bytes: int | None = None
    threads: int = 1
    logs: Style = "text"
    sharers: int = 1


class MakeClip(Record, frozen=True, tag=True):
    """Make the clip of a job.

    Attributes:
        ticket: Tells this attempt from all others.
        bundle: Fingerprint of the bundle.
        request: The checked request, see `catalogue.Asked`.
        image: The file of the first frame.
        folder: An empty folder for the results.
        service: The folder of the service, in which the server expects live streams.
        before: The file of the video that the clip goes on from.
    """

    ticket: str
    bundle: str
    request: dict[str, Any]
    image: str | None
    folder: str
    service: str = ""
    before: str | None = None


class StopClip(Record, frozen=True, tag=True):
    """Stop an attempt before its next launch; it may have ended already."""

    ticket: str


class ReloadBundles(Record, frozen=True, tag=True):
    """Close all bundles, and load these. To be sent between two clips."""

    bundles: tuple[BundlePlace, ...]


class ShutDown(Record, frozen=True, tag=True):
    """End in good order."""


class ChildUsage(Record, frozen=True, kw_only=True):
    """What a child has used since it was started.

    Attributes:
        memory_bytes: The memory of the process.
        gpu_memory_bytes: The memory of its GPU that is in use, by whomever; None without a GPU.
        joules: The energy that its GPU took; None where that is not measured.
        text_hits, text_misses: How often the embedding of a prompt was remembered, and how often not.
    """

    memory_bytes: int = 0
    gpu_memory_bytes: int | None = None
    joules: float | None = None
    text_hits: int = 0
    text_misses: int = 0


class ChildReady(Record, frozen=True, tag=True):
    """The child can make clips.

    Attributes:
        loaded: Fingerprints of the bundles that are loaded; others are loaded when they are needed.
        refused: Why bundles cannot be served, by fingerprint.
        warm: The shape that a bundle was warmed up with, by fingerprint.
    """

    loaded: tuple[str, ...]
    refused: dict[str, str]
    usage: ChildUsage
    warm: dict[str, str] = msgspec.field(default_factory=dict)


class Advance(Record, frozen=True, tag=True):
    """How far loading or a clip is."""

    ticket: str
    stage: str
    percent: int


class ClipBegun(Record, frozen=True, tag=True):
    """The child has begun an attempt. If it ends before it says so, that says nothing of the job."""

    ticket: str


class ClipMade(Record, frozen=True, tag=True):
    """A clip is made.

    Attributes:
        files: Names of the files in the folder by variant: ``video``, ``thumbnail``, ``spritesheet``.
        stages: Seconds of each stage.
        details: What else to tell of it.
        loaded: Fingerprints of the bundles that are now loaded. The child adds this and what it has used.
    """

    ticket: str
    files: dict[str, str]
    backend: str
    stages: dict[str, float]
    details: dict[str, Any]
    loaded: tuple[str, ...] = ()
    usage: ChildUsage = ChildUsage()


class ClipFailed(Record, frozen=True, tag=True):
    """A clip cannot be made.

    Attributes:
        is_last: Whether the child ends because of it.
    """

    ticket: str
    failure: Failure
    is_last: bool


class ClipStopped(Record, frozen=True, tag=True):
    """A clip was stopped as asked."""

    ticket: str


ToChild = SetUp | MakeClip | StopClip | ReloadBundles | ShutDown
ToSupervisor = ChildReady | Advance | ClipBegun | ClipMade | ClipFailed | ClipStopped
Message = TypeVar("Message")


class Channel(Generic[Message]):
    """Messages over two pipes. Every thread may send; one receives.

    Args:
        reads, writes: Descriptors, which are duplicated.
        received: The types of the messages that come in.
    """

    def __init__(self, reads: int, writes: int, received: Any) -> None:
        self._reads = Connection(os.dup(reads), writable=False)
        self._writes = Connection(os.dup(writes), readable=False)
        self._decoder = msgspec.msgpack.Decoder(received)
        self._sending = Lock()

    def send(self, message: ToChild | ToSupervisor) -> None:
        """Send a message.

        Raises:
            OSError: The other side has ended.
        """
        with self._sending:
            self._writes.send_bytes(msgspec.msgpack.encode(message))

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            EOFError, OSError: The other side has ended.
        """
        return self._decoder.decode(self._reads.recv_bytes(MOST_BYTES))

    def wait(self, seconds: float, others: Sequence[int] = ()) -> bool:
        """Wait until a message comes in, the other side ends, or one of some descriptors can be read. Returns whether
        it was one of the first two."""
        return self._reads in wait([self._reads, *others], seconds)

    def close(self) -> None:
        self._reads.close()
        self._writes.close()
