"""Who calls, and how often they may.

Without any API key in the store everybody is `LOCAL`, which only a server on a loopback address allows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Protocol, TypeVar

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from wanforge.runtime.service.settings import SCOPES
from wanforge.runtime.service.store.base import ApiKey
from wanforge.runtime.service.web.forms.errors import ApiError, absent
from wanforge.runtime.service.web.state import Service

LOCAL = ApiKey(id="", owner="local", scopes=(), created_at=0.0)
"""Whoever calls a server that has no keys."""
USUAL = ("read", "write")
BEARER = HTTPBearer(auto_error=False, description="An API key, as `wanforge serve keys add` prints it.")
REMEMBERED_SECONDS = 10.0
"""How long a key that was verified is not looked up again; a revoked key works no longer than that."""


@dataclass
class Bucket:
    """A token bucket: it fills at a rate, up to a size."""

    level: float
    filled_at: float = field(default_factory=time.monotonic)

    def take(self, rate: float, size: float) -> float:
        """Take a token. Returns how many seconds are missing for one; 0 if it was taken."""
        now = time.monotonic()
        self.level = min(size, self.level + (now - self.filled_at) * rate)
        self.filled_at = now
        if self.level < 1.0:
            return (1.0 - self.level) / rate
        self.level -= 1.0
        return 0.0


class KeyRing:
    """Verifies keys and counts requests. The event loop is the only thread that uses it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.buckets: dict[str, Bucket] = {}
        self.verified: dict[str, tuple[float, ApiKey]] = {}

    async def caller(self, text: str | None) -> ApiKey:
        """The key that a request shows.

        Raises:
            ApiError: It shows none where one is needed, or one that is not valid.
        """
        if not await self.service.asks_for_keys():
            return LOCAL
        if not text:
            raise ApiError(401, "missing_api_key", "give an API key: Authorization: Bearer KEY")
        known = self.verified.get(text)
        if known is not None and time.monotonic() - known[0] < REMEMBERED_SECONDS:
            return known[1]
        self.verified.pop(text, None)
        found = await self.service.in_thread(self.service.store.verify_key, text)
        if found is None:
            raise ApiError(401, "invalid_api_key", "this API key is unknown or revoked")
        self.verified[text] = time.monotonic(), found
        return found

    def count(self, caller: ApiKey) -> None:
        """Count a request.

        Raises:
            ApiError: The caller has sent too many.
        """
        limits = self.service.settings.limits
        bucket = self.buckets.setdefault(caller.id, Bucket(limits.burst))
        missing = bucket.take(limits.requests_per_second, limits.burst)
        if missing:
            raise ApiError(429, "rate_limited", "too many requests; wait a little", retry_after=int(missing) + 1)


def allowed(scope: str) -> Callable[..., object]:
    """A dependency that gives the caller, who must be allowed something."""

    async def caller(
        request: Request, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]
    ) -> ApiKey:
        keys: KeyRing = request.app.state.keys
        found = await keys.caller(None if shown is None else shown.credentials)
        if found is not LOCAL and scope not in (found.scopes or USUAL) and "admin" not in found.scopes:
            raise ApiError(403, "not_allowed", f"this API key may not {SCOPES[scope]}")
        keys.count(found)
        return found

    return caller


Reader = Annotated[ApiKey, Depends(allowed("read"))]
Writer = Annotated[ApiKey, Depends(allowed("write"))]
Admin = Annotated[ApiKey, Depends(allowed("admin"))]


class HasOwner(Protocol):
    """What belongs to somebody."""

    @property
    def owner(self) -> str: ...


Owned = TypeVar("Owned", bound=HasOwner)


def seen_by(caller: ApiKey, found: Owned | None, what: str) -> Owned:
    """What was found, if the caller may see it.

    Args:
        what: What was looked for, for the message.

    Raises:
        ApiError: There is none, or it is somebody else's, which is told in the same way.
    """
    if found is None or owner_seen_by(caller) not in (None, found.owner):
        raise absent(what)
    return found


def owner_seen_by(caller: ApiKey) -> str | None:
    """The owner whose jobs a caller sees; None for everybody's."""
    return None if "admin" in caller.scopes else caller.owner
