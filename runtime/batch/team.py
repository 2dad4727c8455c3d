"""Hands that make the clips of a batch, each fed by a thread: who makes what, what is tried again, what is given up.

A hand is a process of this machine or an actor of Ray. A clip goes through one or several stages, each with hands of
its own; what a stage makes of it is handed to the next. A clip whose hand dies is queued again, behind the others.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Event, Lock, Thread
from typing import Any, Protocol

import msgspec

from wanforge.errors import ResourceError
from wanforge.runtime.batch.manifest import Ending, SetApart, StoredClip
from wanforge.runtime.batch.orders import ClipOrder
from wanforge.runtime.service.job import Failure

LOOK_SECONDS = 0.25
"""How often a thread that waits looks whether the batch ends."""
MOST_STARTS = 10
"""How many processes of a hand may die in a row before they are ready; after that, no clip can be made here."""
AHEAD = 2
"""How many clips wait for each hand of a stage until the stage before pauses."""
FINAL = ("invalid_request", "bundle_damaged")
"""Failures that are the same each time."""
FULL = "disk_full"
"""A failure that ends the batch, since it concerns every clip."""
ADVICE = {
    "bundle_damaged": "the bundle or a LoRA is incomplete or damaged; what was logged says more",
    "gpu_failed": "the GPU reported an error",
    "internal_error": "wanforge failed; what was logged says more",
}
"""What to tell of a failure in place of the service's words."""


class LostError(Exception):
    """The process of a hand has ended with a clip in it. The message says how."""


class EndingError(Exception):
    """The batch ends, so the clip is left as it is."""


class FailedError(Exception):
    """A clip cannot be made.

    Attributes:
        failure: Why.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = Failure(failure.code, ADVICE.get(failure.code, failure.message))


class Hand(Protocol):
    """Does one stage of one clip after the other. It is used by one thread, which also ends it."""

    def ready(self, ends: Event) -> None:
        """Make sure that there is a process that can make clips.

        Raises:
            LostError: It died while it was getting ready.
            EndingError: `ends` was set in the meantime.
            WanforgeError: No process can ever be ready.
        """

    def make(self, order: ClipOrder, given: Any, ends: Event) -> Any:
        """Do the stage.

        Args:
            given: What the stage before has made of the clip; None in the first.

        Returns:
            What the next stage is given; a `StoredClip` in the last.

        Raises:
            FailedError: The clip cannot be made.
            LostError: The process has died.
            EndingError: `ends` was set in the meantime.
        """

    def close(self) -> None:
        """End the process."""


@dataclass
class PendingClip:
    """A clip on its way.

    Attributes:
        given: What the stage before has made of it.
        tries: How often a stage of it was begun and did not come to its end.
        attempts: How often its first stage was begun.
    """

    order: ClipOrder
    given: Any = None
    tries: int = 0
    attempts: int = 0


@dataclass
class Tally:
    """How busy hands were.

    Attributes:
        busy_seconds: The time in which they made clips, all of them together.
        deaths: How many of their processes died.
    """

    busy_seconds: float = 0.0
    deaths: int = 0


@dataclass
class Team:
    """All hands of a batch.

    Args:
        stages: The hands of each stage.
        retries: How often a stage of a clip is tried again.
    """

    stages: Sequence[Sequence[Hand]]
    retries: int
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        # No SimpleQueue: several threads wait for each, and in CPython 3.11 one that comes too late may wait for ever.
        self._waiting: list[Queue[PendingClip]] = [Queue() for _ in self.stages]
        self._ended: Queue[tuple[ClipOrder, Ending] | Exception] = Queue()
        self._ends, self._counting = Event(), Lock()
        self._threads: list[Thread] = []

    @property
    def size(self) -> int:
        """The number of all hands."""
        return sum(len(hands) for hands in self.stages)

    def make(self, orders: Sequence[ClipOrder]) -> Iterator[tuple[ClipOrder, Ending]]:
        """Make clips, and yield each as soon as it is settled, in any order.

        Raises:
            Exception: Whatever keeps all hands from making any clip.
        """
        for order in orders:
            self._waiting[0].put(PendingClip(order))
        self._threads = [
            Thread(target=self._work, args=(stage, hand), name=f"hand {stage}.{number}", daemon=True)
            for stage, hands in enumerate(self.stages)
            for number, hand in enumerate(hands)
        ]
        for thread in self._threads:
            thread.start()
        for _ in orders:
            ended = self._next()
            if isinstance(ended, Exception):
                raise ended
            yield ended

    def close(self) -> None:
        """End all hands, whatever they are doing, and wait until they have ended."""
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _next(self) -> tuple[ClipOrder, Ending] | Exception:
        """What was settled next. The main thread takes note of signals only between two waits."""
        while True:
            with suppress(Empty):
                return self._ended.get(timeout=LOOK_SECONDS)

    def _work(self, stage: int, hand: Hand) -> None:
        """Serve a stage until the batch ends."""
        deaths = 0
        try:
            while not self._ends.is_set():
                try:
                    hand.ready(self._ends)
                except LostError as error:
                    deaths += 1
                    self._count(deaths=1)
                    if deaths >= MOST_STARTS:
                        raise ResourceError(
                            f"no clip can be made: {deaths} processes in a row died before they were ready, the last "
                            f"because {error}"
                        ) from None
                    continue
                deaths = 0
                if self._is_far_ahead(stage):
                    self._ends.wait(LOOK_SECONDS)
                    continue
                with suppress(Empty):
                    self._serve(stage, hand, self._waiting[stage].get(timeout=LOOK_SECONDS))
        except EndingError:
            pass
        except Exception as error:
            self._ended.put(error)
        finally:
            hand.close()

    def _is_far_ahead(self, stage: int) -> bool:
        """Whether the next stage has enough to do, so that what this one makes would only take room."""
        later = stage + 1
        return later < len(self.stages) and self._waiting[later].qsize() >= AHEAD * len(self.stages[later])

    def _serve(self, stage: int, hand: Hand, pending: PendingClip) -> None:
        """Do a stage of a clip, and pass it on, queue it again, or set it apart."""
        pending.attempts += stage == 0
        begun = time.monotonic()
        try:
            made = hand.make(pending.order, pending.given, self._ends)
        except LostError as error:
            self._count(deaths=1)
            message = f"its process died each time, the last time because {error}; see whether other clips are made"
            self._try_again(stage, pending, Failure("worker_died", message))
            return
        except FailedError as error:
            if error.failure.code == FULL:
                raise ResourceError(f"{error}; free some space, and run the same command again") from None
            self._try_again(stage, pending, error.failure)
            return
        finally:
            self._count(busy_seconds=time.monotonic() - begun)
        if stage + 1 < len(self.stages):
            self._waiting[stage + 1].put(PendingClip(pending.order, made, 0, pending.attempts))
        else:
            assert isinstance(made, StoredClip)
            self._ended.put((pending.order, msgspec.structs.replace(made, attempts=pending.attempts)))

    def _try_again(self, stage: int, pending: PendingClip, failure: Failure) -> None:
        pending.tries += 1
        if failure.code in FINAL or pending.tries > self.retries:
            self._ended.put((pending.order, SetApart(error=failure, attempts=pending.attempts)))
        else:
            self._waiting[stage].put(pending)

    def _count(self, busy_seconds: float = 0.0, deaths: int = 0) -> None:
        with self._counting:
            self.tally.busy_seconds += busy_seconds
            self.tally.deaths += deaths
