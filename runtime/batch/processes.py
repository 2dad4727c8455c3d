"""Hands that are processes of this machine: the children of the service, without its job store."""

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

from wanforge.errors import BundleError
from wanforge.runtime.batch.manifest import StoredClip
from wanforge.runtime.batch.orders import ClipOrder
from wanforge.runtime.batch.team import LOOK_SECONDS, EndingError, FailedError, LostError
from wanforge.runtime.service.child.messages import (
    BundlePlace,
    ChildReady,
    ClipFailed,
    ClipMade,
    MakeClip,
    ToSupervisor,
)
from wanforge.runtime.service.job import Failure
from wanforge.runtime.service.results.base import ObjectStorage, StorageError
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.workers.process import ChildProcess, EndedError
from wanforge.runtime.service.workers.settings import Seat, Supervision, seats

MAKER = "wanforge.runtime.batch.makers.whole_clips"
HALVES = ("wanforge.runtime.batch.makers.denoising", "wanforge.runtime.batch.makers.decoding")
"""The makers of whole clips, and those of the two stages where the VAE has workers of its own."""
VIDEO, LATENTS_FILE = "video", "latents.safetensors"
"""What makers call the video, and the file in which the first half of a clip leaves its latents."""


@dataclass(frozen=True)
class Pools:
    """How many hands there are.

    Attributes:
        workers: Those that make clips; 0 for as many as there are GPUs, or machines without any.
        decoders: How many more do nothing but decode latents, for which the others then only denoise.
    """

    workers: int = 0
    decoders: int = 0

    @property
    def makers(self) -> tuple[str, ...]:
        """The maker of each stage."""
        return HALVES if self.decoders else (MAKER,)

    def counts(self, workers: int) -> tuple[int, ...]:
        """The number of hands of each stage, where so many make clips."""
        return (workers, self.decoders) if self.decoders else (workers,)


@dataclass
class ProcessHand:
    """A hand with a child, which is started again when it has died.

    Attributes:
        seat: The GPU and the processors of the child.
        place: The bundle and the sets of LoRAs.
        storage: Where clips are stored. A clip that is being made has a folder in its staging, which stays until the
            last stage is done.
        maker: The module that does the stage.
    """

    seat: Seat
    place: BundlePlace
    storage: ObjectStorage
    backend: str = "auto"
    maker: str = MAKER
    settings: Supervision = field(init=False)
    _child: ChildProcess | None = None

    def __post_init__(self) -> None:
        self.settings = Supervision(serve=ServeSettings(backend=self.backend), maker=self.maker)

    def ready(self, ends: Event) -> None:
        if self._child is not None:
            return
        try:
            self._child = ChildProcess(self.settings, self.seat, (self.place,))
            message = self._wait(ends, self.settings.times.load)
        except EndedError as error:
            raise self._lost(str(error)) from None
        if isinstance(message, ChildReady) and message.refused:
            raise BundleError(message.refused[self.place.fingerprint])

    def make(self, order: ClipOrder, given: Any, ends: Event) -> Any:
        folder = self.storage.staging() / order.key
        if given is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        assert self._child is not None
        self._child.send(MakeClip(order.key, self.place.fingerprint, order.request, order.image, str(folder)))
        try:
            outcome = self._wait(ends, self.settings.times.hang)
        except EndedError as error:
            raise self._lost(str(error)) from None
        if isinstance(outcome, ClipFailed):
            if outcome.is_last:
                self.close()
            raise FailedError(outcome.failure)
        assert isinstance(outcome, ClipMade)
        if VIDEO not in outcome.files:
            return outcome.stages
        clip = stored(self.storage, order, outcome, folder, given or {})
        shutil.rmtree(folder, ignore_errors=True)
        return clip

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    def _wait(self, ends: Event, most_seconds: float) -> ToSupervisor:
        """Wait for the end of what the child does.

        Raises:
            EndedError: It has ended, or makes no progress.
            EndingError: The batch ends.
        """
        assert self._child is not None
        heard_at = time.monotonic()
        while True:
            message = self._child.receive(LOOK_SECONDS)
            if isinstance(message, ChildReady | ClipMade | ClipFailed):
                return message
            if ends.is_set():
                raise EndingError
            now = time.monotonic()
            heard_at = now if message is not None else heard_at
            if now - heard_at > most_seconds:
                raise EndedError(f"it made no progress for {most_seconds:g} s")

    def _lost(self, how: str) -> LostError:
        with suppress(OSError):
            self.close()
        return LostError(how)


def stored(
    storage: ObjectStorage, order: ClipOrder, made: ClipMade, folder: Path, before: Mapping[str, float]
) -> StoredClip:
    """Store the clip that a maker has made in a folder.

    Args:
        before: Seconds of the stages that other makers have done.

    Raises:
        FailedError: There is no room, or the storage cannot be reached.
    """
    try:
        storage.add(order.name, folder / made.files[VIDEO])
    except StorageError as error:
        raise FailedError(Failure(error.code, str(error))) from None
    stages = {**before, **made.stages}
    return StoredClip(**made.details, backend=made.backend, seconds=sum(stages.values()), stages=stages)


def process_hands(
    place: BundlePlace, backend: str, storage: ObjectStorage, pools: Pools, most: int
) -> list[list[ProcessHand]]:
    """The hands of each stage.

    Args:
        most: The most hands of a stage that have something to do.
    """
    counts = pools.counts(len(seats(pools.workers)))
    taken = iter(seats(sum(counts)))
    return [
        [ProcessHand(seat, place, storage, backend, maker) for seat in list(islice(taken, count))[:most]]
        for count, maker in zip(counts, pools.makers, strict=True)
    ]
