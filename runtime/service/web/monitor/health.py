"""Whether the server lives, whether it can make videos, and figures for monitoring."""

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from wanforge.runtime.service.web.access import Admin
from wanforge.runtime.service.web.monitor.figures import figures
from wanforge.runtime.service.web.schema import Ready
from wanforge.runtime.service.web.state import service_of
from wanforge.runtime.service.web.videos import errors

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
    """Whether videos can be made: a worker is alive and warm, the job store answers, and there is room on the disk."""
    service = service_of(request)
    reasons = await service.in_thread(service.obstacles)
    found = Ready(ready=not reasons, reasons=reasons)
    return JSONResponse(found.model_dump(), 503 if reasons else 200)


@router.get("/metrics", response_class=Response, responses={200: FIGURES, **errors()}, operation_id="metrics")
async def metrics(request: Request, caller: Admin) -> Response:
    """Figures in the format of Prometheus."""
    service = service_of(request)
    text = await service.in_thread(figures, service.store, Path(service.settings.data))
    return Response(text, media_type=FORMAT)
