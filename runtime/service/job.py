"""The records of the service: a job, what was submitted, and what became of it.

All times are seconds since 1970 by the wall clock, as the API shows them.
"""

import hashlib
from enum import StrEnum
from typing import Any

import msgspec

from wanforge.configs.loading import Record
from wanforge.errors import RequestError

LOWEST_PRIORITY, HIGHEST_PRIORITY = -10, 10


class State(StrEnum):
    """What a job is doing, in the API's words."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        """Whether the job will never run again. Of these states, only ``completed`` still changes, to ``expired``."""
        return self not in (State.QUEUED, State.IN_PROGRESS)


class Failure(Record, frozen=True):
    """Why a job failed.

    Attributes:
        code: A stable word for programs, such as ``out_of_memory``; the store itself uses ``worker_died``.
        message: What went wrong and what to do, for people.
    """

    code: str
    message: str


class Idempotency(Record, frozen=True):
    """How a client marks repetitions of one submission.

    Attributes:
        key: The client's key, which counts for its owner only.
        digest: A hash of the body as the client sent it; `Idempotency.of` makes one.
    """

    key: str
    digest: str

    @classmethod
    def of(cls, key: str, body: bytes) -> "Idempotency":
        return cls(key, hashlib.sha256(body).hexdigest())


class Submission(Record, frozen=True, kw_only=True):
    """A job as it is submitted.

    Attributes:
        owner: Whose job it is; the owner of the API key.
        bundle: Fingerprint of the bundle that makes the clip.
        shape: Width, height and frames, ``832x480x81``: what a worker has to be warm for.
        steps: Number of denoising steps.
        request: The checked request. The store does not look into it.
        priority: Higher is sooner, among the jobs of the same owner: from `LOWEST_PRIORITY` to `HIGHEST_PRIORITY`.
        objects: Names of the objects that the job reads, such as an uploaded image. They live as long as the job.
        idempotency: Set where the client may repeat the submission.
        refused: Set where the request is known to be wrong. Such a job has failed from the start, so that the status
            of a batch counts each of its lines.
    """

    owner: str
    bundle: str
    shape: str
    steps: int
    request: dict[str, Any]
    priority: int = 0
    objects: tuple[str, ...] = ()
    idempotency: Idempotency | None = None
    refused: Failure | None = None

    def __post_init__(self) -> None:
        if not LOWEST_PRIORITY <= self.priority <= HIGHEST_PRIORITY:
            raise RequestError(
                f"the priority is {self.priority}; choose one from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}"
            )


class Result(Record, frozen=True, kw_only=True):
    """What a job has made.

    Attributes:
        objects: Object names by variant: ``video``, ``thumbnail``, ``spritesheet``.
        backend: The backend that made it.
        details: What else the API tells of it: timings, seed, recipe.
    """

    objects: dict[str, str]
    backend: str
    details: dict[str, Any] = msgspec.field(default_factory=dict)


class Lease(Record, frozen=True):
    """A worker's claim on a job, the fence of every change that the worker makes.

    Once the job has gone to another attempt, changes with this lease have no effect.
    """

    job: str
    worker: str
    attempt: int


class Job(Record, frozen=True, kw_only=True):
    """A job as it is now.

    Attributes:
        batch: The batch that it came in, and `line`, its place there from 0.
        attempt: How often it has been started. `worker` is who has it, or had it last.
        lost: How many of these attempts ended because the worker died.
        cancel_requested: Whether its worker was asked to stop.
        progress: Percent of the current attempt.
        objects: Names of the objects that the job reads.
        events: Sequence of its latest event.
    """

    id: str
    owner: str
    bundle: str
    shape: str
    steps: int
    request: dict[str, Any]
    priority: int
    objects: tuple[str, ...]
    state: State
    created_at: float
    batch: str | None = None
    line: int | None = None
    worker: str | None = None
    attempt: int = 0
    lost: int = 0
    cancel_requested: bool = False
    stage: str | None = None
    progress: int = 0
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    result: Result | None = None
    error: Failure | None = None
    events: int = 0

    @property
    def lease(self) -> Lease:
        """The lease of the worker that has the job."""
        return Lease(self.id, self.worker or "", self.attempt)


class JobEvent(Record, frozen=True):
    """Something that happened to a job.

    Attributes:
        sequence: Its number among the events of the job, from 1; the ``id`` of a server-sent event.
        kind: ``queued``, ``started``, ``progress``, ``cancel_requested``, ``requeued`` or a terminal state.
        data: What there is to say about it.
    """

    job: str
    sequence: int
    created_at: float
    kind: str
    data: dict[str, Any]


class Batch(Record, frozen=True):
    """Many jobs that were submitted together. It has ended when all of them have."""

    id: str
    owner: str
    created_at: float
    counts: dict[State, int]

    @property
    def has_ended(self) -> bool:
        return all(state.is_terminal for state, count in self.counts.items() if count)
