"""The errors that users of the nodes see."""

from collections.abc import Mapping
from typing import Any

WIDGETS = {"size": "width and height", "input_reference": "image", "seconds": "seconds", "topk": "attention"}
"""The widgets by whose values fields of a request come about, where they have other names."""


class NodeError(Exception):
    """Something that the user of a node can mend. ComfyUI shows the message at the node."""


class RefusedError(NodeError):
    """The server refuses a request.

    Attributes:
        status: The HTTP status.
        code: The server's stable code.
        retry_after: After how many seconds the server wants to be asked again; None if it does not say.
    """

    def __init__(self, message: str, status: int, code: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class UnreachableError(NodeError):
    """The server does not answer."""


def refused(url: str, status: int, body: Any, retry_after: float | None) -> RefusedError:
    """The error for an answer of the server.

    Args:
        body: The answer's JSON; anything else if it was none.
    """
    error = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(error, Mapping) or not isinstance(error.get("message"), str):
        said = "check that it is the address of wanforge serve"
        return RefusedError(f"{url} answers with status {status}; {said}", status, "unknown", retry_after)
    message, field = error["message"], error.get("param")
    if status == 401:
        message = (
            f"{url} wants an API key ({message}). Set WANFORGE_URL to this address and WANFORGE_API_KEY to the key, "
            "and start ComfyUI again; the key is sent to that address alone"
        )
    else:
        message = f"{WIDGETS.get(field, field) if field else url}: {message}"
    return RefusedError(message, status, str(error.get("code")), retry_after)
