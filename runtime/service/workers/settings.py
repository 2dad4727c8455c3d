"""The settings of the supervisor."""

import os
from pathlib import Path

from wanforge.configs.loading import Count, Positive, Record
from wanforge.runtime.service.settings import ServeSettings

GPUS = Path("/proc/driver/nvidia/gpus")
"""Where NVIDIA's driver lists the GPUs of this machine."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


class WorkTimes(Record, frozen=True, kw_only=True):
    """How long things may take, in seconds.

    Attributes:
        heartbeat: Between two heartbeats of a job; a lease should last several of them.
        progress: Between two notes of progress.
        hang: Without any progress of a clip, after which its child is killed. A single launch may take long on a CPU.
        load: Without any progress of loading, likewise.
        stop: From asking a child to stop until it is killed.
        grace: From the signal to end until jobs that still run are given back.
        sweep: Between two sweeps of the job store and the results.
        orphans: Between two searches for objects that no job knows.
        backoff: From a child's death until the next is started. It doubles with each death in a row, up to
            `most_backoff`.
        deaths: The time in which `Supervision.most_deaths` children may die without having made a clip; after that, the
            worker rests for `rest`.
    """

    heartbeat: Positive = 5.0
    progress: Positive = 0.5
    hang: Positive = 300.0
    load: Positive = 900.0
    stop: Positive = 10.0
    grace: float = 30.0
    sweep: Positive = 5.0
    orphans: Positive = 3600.0
    backoff: Positive = 0.5
    most_backoff: Positive = 60.0
    deaths: Positive = 300.0
    rest: Positive = 300.0


class Supervision(Record, frozen=True, kw_only=True):
    """All settings of the supervisor.

    Attributes:
        serve: The settings of the service.
        maker: The module that makes clips in a child.
        memory_gigabytes: How much the loaded bundles of a worker may take; by default most of what is free.
        most_deaths: How many children of a worker may die within `WorkTimes.deaths`.
    """

    serve: ServeSettings
    maker: str = "wanforge.runtime.service.child.pipelines"
    memory_gigabytes: Positive | None = None
    most_deaths: Count = 5
    times: WorkTimes = WorkTimes()

    @property
    def data(self) -> Path:
        """The folder of the service."""
        return Path(self.serve.data)


class Seat(Record, frozen=True):
    """Where a worker's child runs.

    Attributes:
        gpu: The GPU, as CUDA_VISIBLE_DEVICES names it; empty for the CPU.
        processors: The processors that it may use.
        sharers: How many workers share the memory of the GPU, or that of the machine on the CPU.
    """

    gpu: str
    processors: tuple[int, ...]
    sharers: int = 1


def seats(workers: int) -> list[Seat]:
    """A seat for each worker: GPUs where there are any, and an equal part of the processors.

    Args:
        workers: Their number; 0 for one on each GPU, or one on the CPU.
    """
    gpus, processors = visible_gpus(), sorted(os.sched_getaffinity(0))
    count = workers or len(gpus) or 1
    parts = [tuple(processors[place::count]) for place in range(count)]
    taken = [gpus[place % len(gpus)] if gpus else "" for place in range(count)]
    return [Seat(gpu, part or tuple(processors), taken.count(gpu)) for gpu, part in zip(taken, parts, strict=True)]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, found without loading a library."""
    if VISIBLE in os.environ:
        return [name for name in os.environ[VISIBLE].split(",") if name.strip() not in ("", "-1")]
    return [str(place) for place, _ in enumerate(GPUS.iterdir())] if GPUS.is_dir() else []
