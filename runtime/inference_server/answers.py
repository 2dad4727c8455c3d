"""The responses to a request, and the errors among them."""

import base64
import logging
from collections.abc import Collection
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wanforge.runtime.service.child.failures import Verdict, failure_of
from wanforge.runtime.service.child.maker import StoppedError

log = logging.getLogger(__name__)

CODES = {
    "invalid_request": "INVALID_ARG",
    "out_of_memory": "UNAVAILABLE",
    "gpu_failed": "UNAVAILABLE",
    "disk_full": "UNAVAILABLE",
    "resources_lacking": "UNAVAILABLE",
}
"""Triton's name for the failures that have one. The others are ``INTERNAL``."""


def backend_utilities() -> Any:
    """The module of Triton's Python backend, which exists only in its processes."""
    return import_module("triton_python_backend_utils")


class Answers:
    """Sends responses to one request, of which the last is marked as such.

    Attributes:
        streams: What is sent while the clip is made.
        in_base64: Whether the video is sent as text.
    """

    def __init__(self, request: Any) -> None:
        self.utilities = backend_utilities()
        self.sender = request.get_response_sender()
        self.wanted = set(request.requested_output_names())
        self.streams: Collection[str] = ()
        self.in_base64 = False
        self._told: tuple[str, int] | None = None
        self._frames = 0

    def check_cancelled(self) -> None:
        """Stop if nobody waits for the clip any more.

        Raises:
            StoppedError: The request was cancelled.
        """
        if self.sender.is_cancelled():
            raise StoppedError

    def progress(self, stage: str, percent: int) -> None:
        """Note that more is done: send it if that was asked for, and stop if the request was cancelled."""
        if self._told != (stage, percent):
            self._told = stage, percent
            self.check_cancelled()
            if "progress" in self.streams:
                self.send(STAGE=texts(stage), PERCENT=np.array([percent], np.int32))

    def frame(self, frame: Tensor) -> None:
        """Send a frame, uint8 ``[H, W, 3]``, if that was asked for."""
        if "frames" in self.streams:
            self.send(FRAME=frame.numpy(), FRAME_INDEX=np.array([self._frames], np.int32))
        self._frames += 1

    def send(self, *, is_last: bool = False, **outputs: NDArray[Any]) -> None:
        """Send those of these outputs that the client wants."""
        wanted = {name: array for name, array in outputs.items() if name in self.wanted or not self.wanted}
        if wanted or is_last:
            tensors = [self.utilities.Tensor(name, array) for name, array in wanted.items()]
            self._send(self.utilities.InferenceResponse(output_tensors=tensors), is_last=is_last)

    def finish(self, video: bytes, report: str) -> None:
        """Send the clip."""
        sent = base64.b64encode(video) if self.in_base64 else video
        self.send(is_last=True, VIDEO=texts(sent), REPORT=texts(report))

    def fail(self, error: BaseException) -> Verdict | None:
        """Send an error. Returns the verdict on it, unless it is none of this process."""
        if isinstance(error, StoppedError):
            self.refuse("the request was cancelled", "CANCELLED")
            return None
        if isinstance(error, PassedOnError):
            self._send(self.utilities.InferenceResponse(output_tensors=[], error=error.error), is_last=True)
            return None
        verdict = failure_of(error)
        if verdict.failure.code != "invalid_request":
            log.error("A request failed (%s): %s", verdict.failure.code, error, exc_info=error)
        self.refuse(verdict.failure.message, CODES.get(verdict.failure.code, "INTERNAL"))
        return verdict

    def refuse(self, message: str, code: str) -> None:
        """Send an error by Triton's name for it."""
        error = self.utilities.TritonError(message, getattr(self.utilities.TritonError, code))
        self._send(self.utilities.InferenceResponse(output_tensors=[], error=error), is_last=True)

    def _send(self, response: Any, *, is_last: bool) -> None:
        self.sender.send(response, flags=self.utilities.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)


class PassedOnError(Exception):
    """Another model has failed, with an error of Triton that the client gets as it is."""

    def __init__(self, error: Any) -> None:
        super().__init__(error.message())
        self.error = error


def texts(value: str | bytes) -> NDArray[np.object_]:
    """An output that holds one string."""
    return np.array([value.encode() if isinstance(value, str) else value], np.object_)


class ServerLog(logging.Handler):
    """Shows what wanforge logs in the log of the server."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = backend_utilities().Logger
        if record.levelno >= logging.ERROR:
            logger.log_error(self.format(record))
        elif record.levelno >= logging.WARNING:
            logger.log_warn(self.format(record))
        else:
            logger.log_info(self.format(record))
