"""Fetches a file over HTTPS for a client whom nobody trusts.

The name of a host is resolved once, all its addresses have to be public, and the connection goes to one of them, so
that a name that has another address a moment later changes nothing. TLS still checks the certificate for the name.
Redirects are not followed, nothing is unpacked, and size and time are bounded. It uses httpcore2, on which httpx2 is
built, because that lets a program make the connections.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import httpcore2
import httpx2

from wanforge.errors import RequestError
from wanforge.runtime.service.fetching.addresses import is_public
from wanforge.version import __version__

PORT = 443
SECONDS = 10.0
"""How long all of it may take."""
NAME = re.compile(r"(?=.{4,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])")
"""What the name of a host looks like. No way to write an address ends in a label that begins with a letter."""
HEADERS = [("Accept", "image/*"), ("Accept-Encoding", "identity"), ("User-Agent", f"wanforge/{__version__}")]

Resolve = Callable[[str], Awaitable[list[str]]]


async def resolved(host: str) -> list[str]:
    """The addresses of a host.

    Raises:
        OSError: It has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, PORT, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


class PinnedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses alone.

    Args:
        network: What makes the connection to an address.
    """

    def __init__(self, resolve: Resolve, network: httpcore2.AsyncNetworkBackend) -> None:
        self.resolve, self.network = resolve, network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self.resolve(host)
        if port != PORT or not addresses or not all(map(is_public, addresses)):
            raise httpcore2.ConnectError("no public address")
        return await self.network.connect_tcp(addresses[0], port, timeout, local_address, socket_options)


@dataclass
class Fetcher:
    """Fetches files.

    Attributes:
        hosts: Names of the hosts that may be visited; ``*`` stands for any characters.
        most_bytes: The size of the largest file.
    """

    hosts: tuple[str, ...]
    most_bytes: int
    resolve: Resolve = resolved
    network: httpcore2.AsyncNetworkBackend = field(default_factory=httpcore2.AnyIOBackend)
    context: ssl.SSLContext = field(default_factory=httpx2.create_ssl_context)

    def target(self, text: str) -> str:
        """The URL, if it may be fetched.

        Raises:
            RequestError: It may not.
        """
        try:
            url = httpx2.URL(text)
        except httpx2.InvalidURL as error:
            raise RequestError(f"the URL cannot be read: {error}") from None
        if url.scheme != "https" or url.port not in (None, PORT) or url.userinfo:
            raise RequestError(
                f"only URLs of the form https://host/path are fetched, at port {PORT} and without a password"
            )
        host = url.raw_host.decode("ascii").lower()
        if not NAME.fullmatch(host) or not any(fnmatchcase(host, pattern) for pattern in self.hosts):
            raise RequestError(f"this server fetches nothing from {host!r}; send the picture itself")
        return str(url.copy_with(fragment=None))

    async def fetch(self, text: str) -> bytes:
        """The contents of a URL.

        Raises:
            RequestError: It may not be fetched, cannot be reached, or is too large or too slow.
        """
        url = self.target(text)
        network = PinnedNetwork(self.resolve, self.network)
        try:
            async with (
                asyncio.timeout(SECONDS),
                httpcore2.AsyncConnectionPool(self.context, network_backend=network) as pool,
                pool.stream("GET", url, headers=HEADERS) as answer,
            ):
                if answer.status != 200:
                    raise RequestError(f"the URL was answered with {answer.status}; redirects are not followed")
                return await self._read(answer)
        except TimeoutError:
            raise RequestError(f"the URL was not fetched within {SECONDS:g} s") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError):
            raise RequestError("the host of the URL has no public address that answers") from None

    async def _read(self, answer: httpcore2.Response) -> bytes:
        came = bytearray()
        async for some in answer.aiter_stream():
            came += some
            if len(came) > self.most_bytes:
                raise RequestError(f"the file has more than {self.most_bytes:,} bytes")
        return bytes(came)
