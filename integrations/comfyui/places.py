"""Where servers are, and which key belongs to which."""

import os
from urllib.parse import urlsplit

from .errors import NodeError

URL, KEY = "WANFORGE_URL", "WANFORGE_API_KEY"
"""The environment variables that `wanforge client` has, too."""
DEFAULT = "http://127.0.0.1:8000"
PORTS = {"http": 80, "https": 443}


def url_of(text: str | None) -> str:
    """The address of a server as a widget has it; an empty one stands for the environment's.

    Raises:
        NodeError: It is none.
    """
    url = (text or "").strip() or os.environ.get(URL, "").strip() or DEFAULT
    origin(url)
    return url.rstrip("/")


def origin(url: str) -> tuple[str, str, int]:
    """The scheme, host and port of an address.

    Raises:
        NodeError: It is none, or holds a password.
    """
    try:
        parts = urlsplit(url)
        found = parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme, 0)
    except ValueError:
        found = ("", "", 0)
    if found[0] not in PORTS or not found[1]:
        raise NodeError(f"url: {url!r} is no address of a server; write it like {DEFAULT}")
    if parts.username or parts.password:
        raise NodeError(f"url: leave the name and the password out, and set {KEY} before ComfyUI starts")
    if parts.query or parts.fragment:
        raise NodeError(f"url: {url!r} is more than the address of a server; write it like {DEFAULT}")
    return found


def key_of(url: str) -> str | None:
    """The key for a server. A workflow of somebody else may name any server, so the key is only for the one that the
    environment names.

    Raises:
        NodeError: The key has characters that no key has.
    """
    key = os.environ.get(KEY, "").strip()
    if not key or origin(url) != origin(url_of(None)):
        return None
    if not key.isascii() or not key.isprintable():
        raise NodeError(f"{KEY} has characters that no key has; copy it again from wanforge serve keys add")
    return key


def is_here(url: str) -> bool:
    """Whether a server is on this machine, so that no proxy leads to it."""
    return origin(url)[1] in ("localhost", "127.0.0.1", "::1")
