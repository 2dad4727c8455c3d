"""What a job store does.

**Changes.** Each method is one transaction: it happens with its events, or not at all. Writers take turns, so a claim
sees every job and every quota as they are. A change by a worker names its lease and does nothing once the lease is
lost; it may be repeated, so that a worker that does not know whether it got through can try again.

**Time.** Leases, ageing and durations count running time, which the store keeps itself: it advances with the wall clock
from one use of the store to the next, never backwards, and by at most `LARGEST_STEP` at once. So a clock that is moved
back or forward, a suspended machine and a service that was off for a night end no lease before its worker's next
heartbeat, and a dead worker's lease ends after at most `Policy.lease_seconds` in which the store was in use. What the
API shows, and when results and idempotency keys expire, follows the wall clock. After it has jumped ahead, nothing
expires until `SETTLING` seconds of running time have passed, so that a clock that is set right again expires nothing.

**Order.** A free worker serves the owner that has the fewest jobs running, and among those the one that was served
least recently. Of that owner's jobs it takes the one with the highest priority; a job that waits gains a level for each
`Policy.ageing_seconds`. So a job is overtaken only by jobs of the same owner, and only by those that were submitted at
most that many seconds per level of difference after it. Of jobs with the same priority, one that the worker is warm for
is preferred, but the job that would be next is passed over in that way at most `MOST_PASSES` times. So with one worker
and N owners, a job with k jobs of its owner ahead of it is among the next (1 + MOST_PASSES) N (k + 1) to start. A job
that came within the last `LEFT_SECONDS` is left to another worker if that one is idle and warm for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Literal

from msgspec import Meta

from wanforge.configs.loading import MOST, Count, Positive, Record
from wanforge.errors import RequestError, ResourceError
from wanforge.runtime.service.job import Batch, Failure, Idempotency, Job, JobEvent, Lease, Result, State, Submission

LARGEST_STEP = 10.0
"""The most running time that passes between two uses of the store: two heartbeats, and a third of a lease."""
SETTLING = 600.0
"""Seconds of running time after the wall clock jumped ahead in which nothing expires."""
SMALLEST_JUMP = 60.0
"""Seconds by which the wall clock has to move ahead between two uses of the store to have jumped."""
MOST_PASSES = 3
"""How often a job is passed over for jobs that a worker is warm for."""
LEFT_SECONDS = 1.0
"""How long a new job is left to an idle worker that is warm for it, which needs far less to claim it."""
AtMost = Annotated[int, Meta(ge=0, le=MOST)]


class StoreError(ResourceError):
    """The store cannot do what it was asked to. Nothing of it has happened, unless `is_unknown`.

    Attributes:
        code: ``store_busy``, ``store_full``, ``store_newer``, ``store_damaged`` or ``store_unreachable``.
        is_unknown: Whether the connection broke while the change was being confirmed.
    """

    def __init__(self, code: str, message: str, *, is_unknown: bool = False) -> None:
        super().__init__(message)
        self.code, self.is_unknown = code, is_unknown


class TurnedAwayError(RequestError):
    """A submission, or a change by a client, that the store refuses.

    Attributes:
        code: ``queue_full``, ``too_many_queued``, ``idempotency_conflict``, ``batch_empty``, ``object_gone``,
            ``job_active``, ``unknown_job`` or ``bad_text``.
        retry_after: Seconds after which it is worth trying again; None where it is not.
    """

    def __init__(self, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code, self.retry_after = code, retry_after


class Quota(Record, frozen=True):
    """What one owner may have at once. None is no limit."""

    queued: AtMost | None = None
    running: AtMost | None = None


class Policy(Record, frozen=True, kw_only=True):
    """The rules of a store; every process that opens it should use the same.

    Attributes:
        lease_seconds: How long a job stays with a worker that does not send heartbeats.
        most_lost: How many workers a job may outlive; then it fails with ``worker_died``.
        most_queued: How many jobs may be queued in all.
        quota: What an owner may have if nothing else was set.
        ageing_seconds: How long a job waits to gain a level of priority.
        result_seconds: How long results are kept.
        event_seconds: How long the events of a job are kept after its end.
        record_seconds: How long a job is kept after its end, or after its result expired.
        key_seconds: How long idempotency keys are kept.
    """

    lease_seconds: Positive = 30.0
    most_lost: Count = 2
    most_queued: Count = 10_000
    quota: Quota = Quota()
    ageing_seconds: Positive = 60.0
    result_seconds: Positive = 86_400.0
    event_seconds: Positive = 7 * 86_400.0
    record_seconds: Positive = 30 * 86_400.0
    key_seconds: Positive = 86_400.0


class Receipt(Record, frozen=True):
    """The answer to a submission.

    Attributes:
        is_new: False where the idempotency key led to a job that was submitted before. Objects that were uploaded with
            the repetition belong to no job.
    """

    job: Job
    is_new: bool


BundleShape = tuple[str, str]


class Offer(Record, frozen=True):
    """What a worker can do.

    Attributes:
        worker: A name that no other process has or had: of the machine, the GPU and the start of the process.
        bundles: Fingerprints of the bundles that it serves.
        warm: Bundles and shapes that it has ready.
        left: Those that it leaves to others, which are idle and have them ready.
    """

    worker: str
    bundles: tuple[str, ...]
    warm: tuple[BundleShape, ...] = ()
    left: tuple[BundleShape, ...] = ()


class Pulse(Record, frozen=True):
    """The answer to a heartbeat.

    Attributes:
        is_held: Whether the worker still has the job. If not, it must stop: somebody else may be running it.
        cancel_requested: Whether it should stop and call `JobStore.stopped`.
    """

    is_held: bool
    cancel_requested: bool


class JobFilter(Record, frozen=True, kw_only=True):
    """Which jobs to list. `after` is the id of the last job of the page before."""

    owner: str | None = None
    states: tuple[State, ...] = ()
    batch: str | None = None
    after: str | None = None
    limit: int = 20
    order: Literal["asc", "desc"] = "desc"


class JobPage(Record, frozen=True):
    """Some jobs, and whether there are more."""

    jobs: list[Job]
    has_more: bool


class Census(Record, frozen=True):
    """How many jobs there are, by state and owner, for metrics.

    Attributes:
        states: The number of jobs in each state.
        owners: The numbers of queued and of running jobs of each owner that has any.
        oldest_queued_seconds: Running time that the oldest queued job has been waiting; 0 if there is none.
    """

    states: dict[State, int]
    owners: dict[str, tuple[int, int]]
    oldest_queued_seconds: float


class DurationKey(Record, frozen=True):
    """What decides how long a job takes."""

    bundle: str
    shape: str
    steps: int


class ApiKey(Record, frozen=True, kw_only=True):
    """An API key without its secret."""

    id: str
    owner: str
    scopes: tuple[str, ...]
    created_at: float
    revoked_at: float | None = None


AT_ONCE, SOON = 0.01, 0.05
"""Seconds until something new is told to those who hold work up while they wait, and to others."""


class News(ABC):
    """Tells when something in the store has changed, whoever changed it. It is used by one thread."""

    @abstractmethod
    def wait(self, seconds: float, delay: float = AT_ONCE) -> bool:
        """Wait until something has been committed since the last call, or since this object was made, and say whether
        something was. It may be what the caller does not care for; progress if that is told apart (`JobStore.news`).

        Args:
            delay: How many seconds late it may be told. Where news have to be looked for, each look takes some time.
        """

    @abstractmethod
    def close(self) -> None: ...


class JobStore(ABC):
    """All jobs. Every thread and every process can use one; a forked child can go on using its parent's."""

    answers_at_once: bool
    """Whether reading one job takes so little time that nobody needs another thread for it."""

    # Clients

    @abstractmethod
    def submit(self, submission: Submission) -> Receipt:
        """Add a job.

        Raises:
            TurnedAwayError: The queue or the owner's quota is full, or the idempotency key came with another body.
        """

    @abstractmethod
    def earlier(self, owner: str, mark: Idempotency) -> Job | None:
        """The job of an owner that came with a key of idempotency. With another body, it is refused as by `submit`."""

    @abstractmethod
    def submit_batch(self, submissions: Sequence[Submission], batch: str | None = None) -> Batch:
        """Add many jobs of one owner, or none of them. The first one's key of idempotency stands for the batch; those
        of the others are not looked at.

        Args:
            batch: An id, if the caller has one already. Repeating it returns the batch that is there.

        Raises:
            TurnedAwayError: There are none, not all of them fit into the queue and the owner's quota, or the key of
                idempotency came with another body.
        """

    @abstractmethod
    def cancel(self, job: str) -> Job | None:
        """Cancel a queued job at once, and ask the worker of a running one to stop. A job that has ended stays as it
        is. Returns the job as it then is; None if there is none."""

    @abstractmethod
    def cancel_batch(self, batch: str) -> Batch | None:
        """Cancel every job of a batch that has not ended."""

    @abstractmethod
    def delete(self, job: str) -> bool:
        """Delete a job that has ended, with its events; its objects become removable. Returns False if there is none.

        Raises:
            TurnedAwayError: The job has not ended and has to be cancelled first.
        """

    @abstractmethod
    def get(self, job: str) -> Job | None: ...

    @abstractmethod
    def jobs(self, which: JobFilter) -> JobPage:
        """Jobs in the order of their submission.

        Raises:
            TurnedAwayError: There is no job `which.after`.
        """

    @abstractmethod
    def batch(self, batch: str) -> Batch | None: ...

    @abstractmethod
    def position(self, job: str) -> int | None:
        """About how many jobs will start before this one does; None if it is not queued."""

    @abstractmethod
    def positions(self) -> dict[str, int]:
        """The `position` of every queued job."""

    @abstractmethod
    def latest(self, jobs: Collection[str]) -> dict[str, int]:
        """The sequence of the latest event of some jobs, of those that there are."""

    @abstractmethod
    def events(self, job: str, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        """The events of a job with a sequence above `after`, oldest first."""

    @abstractmethod
    def news(self, *, of_progress: bool = True) -> News: ...

    # Workers

    @abstractmethod
    def claim(self, offer: Offer) -> Job | None:
        """Give a worker the job that is next, if there is one that it can serve. Leases that have run out end first."""

    @abstractmethod
    def heartbeat(self, lease: Lease, stage: str | None = None, progress: int = 0) -> Pulse:
        """Extend a lease and note how far the job is, which a power cut may undo. Within an attempt, progress grows."""

    @abstractmethod
    def complete(self, lease: Lease, result: Result) -> bool:
        """The job is done, and its objects are stored. Returns False, and changes nothing, if the lease is lost."""

    @abstractmethod
    def fail(self, lease: Lease, failure: Failure) -> bool:
        """The job cannot be done. Returns False, and changes nothing, if the lease is lost."""

    @abstractmethod
    def stopped(self, lease: Lease) -> bool:
        """The worker has stopped, as it was asked to. Returns False if it was not, or if the lease is lost."""

    @abstractmethod
    def requeue(self, lease: Lease, *, counts: bool) -> bool:
        """Give a job back, to the place in the queue that it had.

        Args:
            counts: Whether the attempt counts as lost, as it does if the worker died of the job, but not if the service
                is being stopped.
        """

    @abstractmethod
    def release(self, workers: Collection[str], *, counts: bool) -> list[str]:
        """Requeue all jobs of some workers that have ended. Returns their ids."""

    # The supervisor

    @abstractmethod
    def sweep(self) -> list[str]:
        """Do what time asks for: end leases that have run out, expire results, forget old events, jobs and keys. To be
        called every few seconds. Returns the ids of the jobs that changed their state."""

    @abstractmethod
    def fail_unserved(self, served: Collection[str], after_seconds: float) -> list[str]:
        """Note that some bundles are served, and fail the queued jobs whose bundles nobody serves any more. To be
        called every few seconds. Returns the ids of the jobs that have failed.

        Args:
            served: Fingerprints of the bundles that the caller serves.
            after_seconds: How long nobody has to have served a bundle, in running time: long enough for a change of
                mind, and for other machines that share the store to start again.
        """

    @abstractmethod
    def removable(self, limit: int = 1000) -> list[str]:
        """Names of objects that belong to no job any more. Whoever has deleted one calls `removed`; until then it is
        named again, so nothing is forgotten if the caller is killed in between."""

    @abstractmethod
    def removed(self, objects: Collection[str]) -> None:
        """Forget removable objects that have been deleted."""

    @abstractmethod
    def known(self, objects: Collection[str]) -> set[str]:
        """Those of some objects that a job has, or that are removable. An object that is not known and was stored more
        than a day ago is an orphan: its job was lost to another attempt, or its submission was refused."""

    @abstractmethod
    def census(self) -> Census: ...

    @abstractmethod
    def durations(self, key: DurationKey, limit: int = 50) -> list[float]:
        """Seconds of running time that the latest jobs of a kind took from their claim to completion, latest first."""

    # API keys

    @abstractmethod
    def add_key(self, owner: str, scopes: Iterable[str] = ()) -> tuple[ApiKey, str]:
        """Make a key. Returns it and the text ``id_secret``, which is stored nowhere."""

    @abstractmethod
    def api_keys(self) -> list[ApiKey]: ...

    @abstractmethod
    def revoke_key(self, key: str) -> bool:
        """Make a key invalid for ever. Returns False if there is no such key or it is revoked already."""

    @abstractmethod
    def verify_key(self, text: str) -> ApiKey | None:
        """The key that a text belongs to; None if it is unknown, wrong or revoked."""

    @abstractmethod
    def set_quota(self, owner: str, quota: Quota | None) -> None:
        """Set what an owner may have; None sets it back to `Policy.quota`."""

    @abstractmethod
    def quota(self, owner: str) -> Quota:
        """What an owner may have."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections of this process. The store can be used again."""
