"""Hands that are processes of this machine: the children of the service, without its job store."""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from wanforge.errors import BundleError
from wanforge.runtime.batch.crew import LOOK_SECONDS, EndingError, FailedError, LostError
from wanforge.runtime.batch.manifest import StoredClip
from wanforge.runtime.batch.orders import ClipOrder
from wanforge.runtime.service.child.messages import (
    BundlePlace,
    ChildReady,
    ClipFailed,
    ClipMade,
    MakeClip,
    ToSupervisor,
)
from wanforge.runtime.service.results.base import ObjectStorage
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.workers.process import ChildProcess, EndedError
from wanforge.runtime.service.workers.settings import Seat, Supervision

MAKER = "wanforge.runtime.batch.maker"


@dataclass
class ProcessHand:
    """A hand with a child, which is started again when it has died.

    Attributes:
        seat: The GPU and the processors of the child.
        place: The bundle and the sets of LoRAs.
        storage: Where clips are stored.
        name: The name of its folder for clips that are being made.
    """

    seat: Seat
    place: BundlePlace
    storage: ObjectStorage
    name: str
    backend: str = "auto"
    settings: Supervision = field(init=False)
    _child: ChildProcess | None = None

    def __post_init__(self) -> None:
        self.settings = Supervision(serve=ServeSettings(backend=self.backend), maker=MAKER)

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
        folder = self.storage.staging() / self.name
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
        return stored(self.storage, order, outcome, folder)

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


def stored(storage: ObjectStorage, order: ClipOrder, made: ClipMade, folder: Path) -> StoredClip:
    """Store the clip that a maker has made in a folder.

    Raises:
        StorageError: There is no room, or the storage cannot be reached.
    """
    storage.add(order.name, folder / made.files["video"])
    return StoredClip(**made.details, backend=made.backend, seconds=sum(made.stages.values()), stages=made.stages)


def process_hands(seats: Sequence[Seat], place: BundlePlace, storage: ObjectStorage, backend: str) -> list[ProcessHand]:
    """A hand for each seat."""
    return [ProcessHand(seat, place, storage, f"hand-{number}", backend) for number, seat in enumerate(seats)]
