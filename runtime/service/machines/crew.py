"""The workers that a server counts on: those of its own machine, or those of all machines."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from wanforge.runtime.service.machines.roll import Member, Roll
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.store.base import JobStore, StoreError
from wanforge.runtime.service.workers.status import (
    LOST,
    READY,
    ServiceStatus,
    WorkerStatus,
    read_status,
)

LOST_SECONDS = 30.0
"""How long a machine may say nothing until it counts as lost: as long as a lease of its jobs lasts."""
NOBODY = "no machine with workers has been heard of; start one: wanforge serve --role worker"

Crew = Callable[[], ServiceStatus | None]
"""Tells the workers; None where nothing is known of them."""


def crew_of(settings: ServeSettings, store: JobStore) -> Crew:
    """The workers that a server counts on."""
    if settings.role != "api":
        return partial(read_status, Path(settings.data))
    roll = Roll.of(store)

    def told() -> ServiceStatus:
        try:
            return together(roll.machines())
        except StoreError as error:
            return ServiceStatus(supervisor=0, written=time.monotonic(), workers=(), problem=str(error))

    return told


def together(machines: Iterable[Member]) -> ServiceStatus:
    """The workers of all machines as if they were those of one."""
    found = list(machines)
    present = [each for each in found if each.seconds < LOST_SECONDS]
    workers = tuple(worker for each in found for worker in named(each))
    problems = [f"{each.name}: {each.status.problem}" for each in present if each.status.problem]
    is_any = any(worker.state in READY for worker in workers)
    return ServiceStatus(
        supervisor=0,
        written=time.monotonic(),
        workers=workers,
        problem="" if is_any else "; ".join(problems) or ("" if workers else NOBODY),
        bundles=tuple({bundle for each in present for bundle in each.status.bundles}),
    )


def named(machine: Member) -> list[WorkerStatus]:
    """The workers of a machine, named after it. None of them is ready if the machine is not."""
    is_lost, problem = machine.seconds >= LOST_SECONDS, machine.status.problem
    silent = f"its machine was last heard of {machine.seconds:.0f} s ago"
    found = []
    for worker in machine.status.workers:
        told = replace(worker, name=f"{machine.name}/{worker.name}")
        if is_lost:
            told = replace(told, state=LOST, reason=silent, job=None)
        elif problem and worker.state in READY:
            told = replace(told, state="waiting", reason=problem)
        found.append(told)
    return found
