"""The application: all routes of the service, and what every answer has in common."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wanforge.runtime.service.settings import MEGABYTE
from wanforge.runtime.service.web import batches, catalogued, content, document, page, stream, videos
from wanforge.runtime.service.web.access import KeyRing
from wanforge.runtime.service.web.extensions import routes as extensions
from wanforge.runtime.service.web.forms import errors
from wanforge.runtime.service.web.guard.bodies import Bounded
from wanforge.runtime.service.web.guard.sites import OwnSite
from wanforge.runtime.service.web.monitor import health
from wanforge.runtime.service.web.monitor.answers import Counted
from wanforge.runtime.service.web.state import Service
from wanforge.runtime.service.web.streams import routes as streams
from wanforge.version import __version__

DESCRIPTION = """Makes videos from prompts. The shape of the API is that of `/v1/videos`, as OpenAI's client and other
servers for video models know it. Errors are objects with a stable `code`."""
SECURE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of every answer."""


def create_app(service: Service) -> FastAPI:
    """The application of a service."""
    limits = service.settings.limits
    most = int(max(limits.body_megabytes, limits.batch_megabytes) * MEGABYTE)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.newsroom.open()
        try:
            yield
        finally:
            service.newsroom.close()
            await service.screens.close()

    app = FastAPI(
        title="wanforge",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from another server
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.state.service = service
    app.state.keys = KeyRing(service)
    rooms = (videos, extensions, content, stream, streams, batches, catalogued, health, page)
    routers = [room.router for room in ((health,) if service.settings.role == "worker" else rooms)]
    for router in routers:
        app.include_router(router)
    app.state.routes = [route for router in routers for route in router.routes]
    errors.install(app)
    document.install(app)

    app.add_middleware(Bounded, most=most)
    app.add_middleware(OwnSite, service=service)
    app.add_middleware(Secured)
    app.add_middleware(Counted, figures=service.answers)
    return app


class Secured:
    """Adds the headers of `SECURE` to every answer that does not have them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURE.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, sending)
