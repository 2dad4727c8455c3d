"""A job as the API tells of it, with its place in the queue and when it will be done."""

import random
import time

from wanforge.runtime.service.catalogue import Asked
from wanforge.runtime.service.job import Job, State
from wanforge.runtime.service.store.base import DurationKey
from wanforge.runtime.service.web.forms.schema import Problem, Video
from wanforge.runtime.service.web.state import Service

RUNNING_MS, QUEUED_MS = (500, 2000), (1000, 30_000)
"""How long clients should wait between two looks at least and at most: while a job runs, and while it is queued."""
PATIENCE, GUESS = 0.9, 0.5
"""The part of the time until a job is done after which it is worth looking again, because that time is known to some
ten percent; and the part of the job's age, where nothing is known."""


def told(service: Service, job: Job, *, with_place: bool = True) -> Video:
    """A job as an object of the API.

    Args:
        with_place: Whether to look up its place in the queue and how long it will take.
    """
    asked = Asked.known_of(job)
    position = service.outlook.position(job.id) if with_place and job.state is State.QUEUED else None
    details = {} if job.result is None else job.result.details
    frames = frames_made(job)
    return Video(
        id=job.id,
        status=job.state.value,
        progress=100 if job.state is State.COMPLETED else min(99, job.progress),
        created_at=int(job.created_at),
        started_at=whole(job.started_at),
        completed_at=whole(job.completed_at),
        expires_at=whole(job.expires_at),
        model=asked.model,
        prompt=asked.prompt,
        size=f"{asked.width_px}x{asked.height_px}",
        seconds=f"{(frames - 1) / asked.fps:g}",
        error=None if job.error is None else Problem(code=job.error.code, message=job.error.message),
        frames=frames,
        seed=asked.seed,
        steps=asked.steps,
        topk=asked.topk,
        lora=asked.lora,
        loras=details.get("loras"),
        recipe=asked.recipe,
        backend=asked.backend if job.result is None else job.result.backend,
        priority=job.priority,
        attempt=job.attempt,
        stage=job.stage if job.state is State.IN_PROGRESS else None,
        queue_position=position,
        estimated_seconds=estimated(service, job, position) if with_place else None,
        timings=details.get("timings"),
        batch_id=job.batch,
        live=asked.live is not None,
    )


def frames_made(job: Job) -> int:
    """The frames of a video; before it is there, those that were asked for."""
    found: int = ({} if job.result is None else job.result.details).get("frames", Asked.known_of(job).frames)
    return found


def estimated(service: Service, job: Job, position: int | None) -> float | None:
    """About how many seconds until a job is done, if jobs of its kind were made before.

    The jobs ahead of it are taken to last as long as it does.
    """
    if job.state.is_terminal:
        return None
    each = service.outlook.usual_seconds(DurationKey(job.bundle, job.shape, job.steps))
    if each is None:
        return None
    if job.state is State.IN_PROGRESS:
        return round(each * (1 - job.progress / 100), 1)
    return round(each * (1 + (position or 0) / max(1, service.outlook.makers())), 1)


def poll_after_ms(job: Job, expected_seconds: float | None) -> int:
    """When a client should look again: after a part of the time that the job is expected to take yet, or of its age,
    where nothing is expected; sooner or later by a tenth, so that not all come at the same moment.

    Args:
        expected_seconds: How long it will take until the job is done.
    """
    least, most = RUNNING_MS if job.state is State.IN_PROGRESS else QUEUED_MS
    seconds = GUESS * (time.time() - job.created_at) if expected_seconds is None else PATIENCE * expected_seconds
    return int(random.uniform(0.9, 1.1) * min(most, max(least, 1000 * seconds)))


def whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
