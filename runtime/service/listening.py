"""Where the service listens."""

import socket

from wanforge.errors import ResourceError
from wanforge.runtime.service.settings import ServeSettings

WAITING = 2048
"""How many connections may wait to be taken."""


def listener(settings: ServeSettings) -> socket.socket:
    """A socket that listens at the address of the settings. From now on, clients can connect.

    Raises:
        ResourceError: The address is taken, or not of this machine.
    """
    listening = None
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        # With the protocol named, asyncio sends small answers at once, not after the client's acknowledgement.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(WAITING)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ResourceError(
            f"{settings.host}, port {settings.port}: {error.strerror}; end what uses it, or choose another with --port"
        ) from None
    return listening


def url_of(host: str, port: int) -> str:
    """Where a browser of this machine finds the server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
