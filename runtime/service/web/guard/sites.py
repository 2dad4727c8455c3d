"""What other sites may do through somebody's browser to a server without keys: nothing.

Such a server trusts whoever reaches this machine's own address, and every page that a browser of this machine shows can
send requests there. A request with a key needs no such rule, because other pages do not have the key.
"""

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from wanforge.runtime.service.web.forms.errors import ApiError
from wanforge.runtime.service.web.state import Service

REMEDY = "make a key, with which every site and every name will do: wanforge serve keys add NAME"


class OwnSite:
    """Refuses requests of other sites as long as the service has no keys. A machine that only makes clips tells nothing
    but how it is, and monitors ask it by any of its addresses."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = self.service.settings.role == "worker" or scope["type"] != "http"
        problem = "" if is_open or await self.service.asks_for_keys() else problem_of(Headers(scope=scope))
        if problem:
            await ApiError(403, "not_allowed", f"{problem}; {REMEDY}").response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def problem_of(headers: Headers) -> str:
    """Why a request is one of another site; empty if it is not.

    A page of another site has another origin. A name that its owner lets point at this machine has the right origin,
    but is no name of this machine.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    if not is_own(host):
        return f"without keys, this server has no name but localhost, and the request is for {host!r}"
    if origin is not None and urlsplit(origin).netloc != host:
        return f"without keys, this server does nothing for pages of other sites, and the request comes from {origin!r}"
    return ""


def is_own(host: str) -> bool:
    """Whether a header names an address of this machine alone."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False
