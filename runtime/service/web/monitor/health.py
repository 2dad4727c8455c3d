"""Whether the server lives, whether it can make videos, and figures for monitoring."""

from pathlib import Path
from shutil import disk_usage

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from wanforge.host.capacity import available_bytes
from wanforge.runtime.service.web.access import Admin
from wanforge.runtime.service.web.forms.schema import Ready, WorkerHealth
from wanforge.runtime.service.web.monitor.figures import figures
from wanforge.runtime.service.web.state import Service, service_of
from wanforge.runtime.service.web.videos import errors
from wanforge.runtime.service.workers.status import ServiceStatus, WorkerStatus

router = APIRouter(tags=["health"])

FORMAT = "text/plain; version=0.0.4; charset=utf-8"
FIGURES = {"description": "The figures.", "content": {"text/plain": {"schema": {"type": "string"}}}}


@router.get("/livez", response_class=PlainTextResponse, operation_id="livez")
async def livez() -> str:
    """The server answers. Whether it can make videos, `/readyz` says."""
    return "alive\n"


@router.get(
    "/readyz",
    response_model=Ready,
    responses={503: {"model": Ready, "description": "Videos cannot be made; `reasons` says why."}},
    operation_id="readyz",
)
async def readyz(request: Request) -> Response:
    """Whether videos can be made: a worker is alive and warm, the job store answers, and there is room on the disk. It
    tells how every worker is, and what is free. `reasons` also says which bundles cannot be served while others can."""
    service = service_of(request)
    found = await service.in_thread(readiness, service)
    return JSONResponse(found.model_dump(), 200 if found.ready else 503)


def readiness(service: Service) -> Ready:
    """What there is to tell of a service."""
    reasons, data = service.obstacles(), Path(service.settings.data)
    status = service.crew()
    return Ready(
        ready=not reasons,
        reasons=[*reasons, *([] if status is None else [*status.refusals(), *unserved(service, status)])],
        workers=[] if status is None else [told(worker) for worker in status.workers],
        disk_free_bytes=disk_usage(data).free if data.exists() else None,
        memory_free_bytes=int(available_bytes()),
    )


def unserved(service: Service, status: ServiceStatus) -> list[str]:
    """Which bundles nobody serves of those that this server takes requests for, if its workers are on other machines
    and there are any."""
    if service.settings.role != "api" or not status.bundles:
        return []
    missing = [each.name for each in service.catalogue.served if each.fingerprint not in status.bundles]
    return [f"no worker serves {name}; serve the same bundles with every role" for name in missing]


def told(worker: WorkerStatus) -> WorkerHealth:
    """A worker as an object of the API."""
    return WorkerHealth(
        name=worker.name,
        state=worker.state,
        reason=worker.reason,
        has_job=worker.job is not None,
        last_completed_at=None if worker.last_good_at is None else int(worker.last_good_at),
        memory_bytes=worker.usage.memory_bytes,
        gpu_memory_bytes=worker.usage.gpu_memory_bytes,
    )


@router.get("/metrics", response_class=Response, responses={200: FIGURES, **errors()}, operation_id="metrics")
async def metrics(request: Request, caller: Admin) -> Response:
    """Figures in the format of Prometheus."""
    service = service_of(request)
    return Response(await service.in_thread(told_figures, service), media_type=FORMAT)


def told_figures(service: Service) -> bytes:
    """The figures of a service. Both the store and the crew may ask a database, which takes as long as it likes."""
    return figures(service.store, Path(service.settings.data), service.answers, service.crew())
