"""What the supervisor tells of its workers: a small file that is written anew every second.

It is a file and not a part of the job store, because it has to be readable while the store is locked or away, because
a commit every second would wake everybody who waits for news, and because it concerns one machine, while several may
share a store.
"""

import os
import time
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path

import msgspec

from wanforge.configs.loading import Record
from wanforge.runtime.service.child.messages import ChildUsage
from wanforge.whole_file import temporary_file

STATUS = "workers.json"
STALE_SECONDS = 10.0
"""The age from which a status is that of a supervisor that has ended or hangs."""
BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Upper bounds of the histograms, in seconds."""
MOST_KINDS = 50
"""The most kinds of clips whose durations a worker tells apart."""
READY = ("idle", "working")
LOST = "lost"
"""The state of workers whose machine is not heard of any more."""
OUTCOMES = (
    *("completed", "cancelled", "requeued"),
    *("invalid_request", "out_of_memory", "gpu_failed", "disk_full", "bundle_damaged", "resources_lacking"),
    *("internal_error", "worker_died", "worker_hung", "storage_refused", "storage_unreachable", "object_gone"),
    "nobody_watches",
)
"""How attempts end, as far as is known beforehand."""


class Histogram(Record, frozen=True):
    """How often a stage took how long.

    Attributes:
        counts: The number of durations up to each of `BOUNDS`, and of longer ones.
        sum: Seconds of all of them.
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    sum: float = 0.0

    def with_one(self, seconds: float) -> "Histogram":
        """The histogram with one more duration."""
        counts = list(self.counts)
        counts[bisect_left(BOUNDS, seconds)] += 1
        return Histogram(tuple(counts), self.sum + seconds)


class ClipKind(Record, frozen=True):
    """What durations are told apart by. Model and size are as clients name them: ``832x480``."""

    model: str
    size: str
    recipe: str


OTHER = ClipKind("other", "other", "other")


class StageTimes(Record, frozen=True):
    """The durations of one stage of one kind of clip."""

    kind: ClipKind
    stage: str
    times: Histogram = Histogram()


class WorkerStatus(Record, frozen=True, kw_only=True):
    """A worker.

    Attributes:
        state: ``starting``, ``idle``, ``working``, ``waiting`` before a child is started again, ``broken`` or
            ``ended``.
        reason: Why it is not ready.
        child: Process id of its child.
        loaded: Fingerprints of the bundles that its child has loaded.
        refused: Why bundles cannot be served, by fingerprint.
        usage: What its child has used.
        restarts: How often a child was started again.
        last_good_at: When it last completed a job, in seconds since 1970.
        outcomes: How many attempts ended in which way: ``completed``, ``cancelled``, ``requeued`` or a failure's code.
        stages: Durations of the stages of completed jobs, of up to `MOST_KINDS` kinds of clips and of all others.
    """

    name: str
    state: str = "starting"
    reason: str = ""
    child: int | None = None
    job: str | None = None
    loaded: tuple[str, ...] = ()
    refused: dict[str, str] = msgspec.field(default_factory=dict)
    usage: ChildUsage = ChildUsage()
    restarts: int = 0
    last_good_at: float | None = None
    outcomes: dict[str, int] = msgspec.field(default_factory=dict)
    stages: tuple[StageTimes, ...] = ()

    def with_outcome(self, outcome: str) -> "WorkerStatus":
        """The status after an attempt."""
        outcomes = {**self.outcomes, outcome: self.outcomes.get(outcome, 0) + 1}
        return msgspec.structs.replace(self, outcomes=outcomes)

    def with_times(self, kind: ClipKind, stages: Mapping[str, float]) -> "WorkerStatus":
        """The status after a job was completed whose stages took so many seconds."""
        found = {(each.kind, each.stage): each.times for each in self.stages}
        kinds = {each.kind for each in self.stages}
        told = kind if kind in kinds or len(kinds) < MOST_KINDS else OTHER
        for stage, seconds in stages.items():
            found[told, stage] = found.get((told, stage), Histogram()).with_one(seconds)
        times = tuple(StageTimes(*place, each) for place, each in found.items())
        return msgspec.structs.replace(self, stages=times)


class ServiceStatus(Record, frozen=True, kw_only=True):
    """All workers of a machine.

    Attributes:
        supervisor: Process id of the supervisor.
        written: When it was written, by the clock that all processes of the machine share and nobody can set.
        lease_names: The names in the job store under which its workers hold leases.
        problem: Why no jobs are started, such as a full disk.
        bundles: Fingerprints of the bundles that they serve.
    """

    supervisor: int
    written: float
    workers: tuple[WorkerStatus, ...]
    lease_names: tuple[str, ...] = ()
    problem: str = ""
    bundles: tuple[str, ...] = ()

    def obstacles(self) -> list[str]:
        """Why no videos can be made now; empty if they can."""
        if time.monotonic() - self.written > STALE_SECONDS:
            return ["the supervisor of the workers has ended or hangs"]
        if self.problem:
            return [self.problem]
        if any(worker.state in READY for worker in self.workers):
            return []
        return [f"{worker.name} is {worker.state}: {worker.reason}".rstrip(": ") for worker in self.workers]

    def refusals(self) -> list[str]:
        """Why bundles cannot be served, of those that every worker refuses which is ready."""
        ready = [worker.refused for worker in self.workers if worker.state in READY]
        if not ready:
            return []
        return [said for bundle, said in ready[0].items() if all(bundle in refused for refused in ready)]


def write_status(data: Path, status: ServiceStatus) -> None:
    """Write the status. It need not survive a power failure, so nothing is synced."""
    path = data / STATUS
    with temporary_file(path) as temporary:
        temporary.write_bytes(msgspec.json.encode(status))
        os.replace(temporary, path)


def read_status(data: Path) -> ServiceStatus | None:
    """The status that was written last; None if there is none of this version."""
    try:
        return msgspec.json.decode((data / STATUS).read_bytes(), type=ServiceStatus)
    except (OSError, msgspec.DecodeError):
        return None


def obstacles(data: Path) -> list[str]:
    """Why no videos can be made now; empty if they can."""
    return obstacles_of(read_status(data))


def obstacles_of(status: ServiceStatus | None) -> list[str]:
    """The same, of a status that was read."""
    return ["the workers were not started"] if status is None else status.obstacles()
