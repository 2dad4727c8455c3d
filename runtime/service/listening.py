"""Where the service listens."""

import resource
import socket

from wanforge.errors import ResourceError
from wanforge.runtime.service.settings import ServeSettings

MOST_CONNECTIONS = 2000
OTHER_FILES = 400
"""Files that are open besides those of connections, most of which belong to the job store's threads."""
WAITING = 2048
"""How many connections may wait to be taken."""
UNSENT_BYTES = 1 << 17
"""About how many bytes the kernel holds for a client that it has not sent yet. By default it holds megabytes, which are
many seconds of a live stream."""


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
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)  # of its connections
        listening.bind(address)
        listening.listen(WAITING)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ResourceError(
            f"{settings.host}, port {settings.port}: {error.strerror}; end what uses it, or choose another with --port"
        ) from None
    return listening


def room_for_connections() -> int:
    """Let this process open as many files as the service can use, if it may, and return how many connections it can
    have at once. A connection may take two files: its socket, and the video that is being sent."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else connections_with(soft)


def connections_with(files: int) -> int:
    """How many connections there may be in a process that may open so many files."""
    return min(MOST_CONNECTIONS, max((files - OTHER_FILES) // 2, files // 8))


def url_of(host: str, port: int) -> str:
    """Where a browser of this machine finds the server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
