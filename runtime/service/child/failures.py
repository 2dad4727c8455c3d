"""Which code a job fails with, and whether the process that tried it can go on."""

import errno
import re
from typing import NamedTuple

from wanforge.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    GpuError,
    RequestError,
    ResourceError,
    WanforgeError,
    message_of,
)
from wanforge.host.library_errors import GPU_FAILED, OUT_OF_MEMORY, is_of_a_library
from wanforge.runtime.service.job import Failure
from wanforge.runtime.service.live.wire import NobodyWatchesError

PATH = re.compile(r"""(?<![\w.~/:])['"]?/[^\s'",;:()]+['"]?""")
"""An absolute path."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Verdict(NamedTuple):
    """A failure, and whether the process has to end."""

    failure: Failure
    is_last: bool


def failure_of(error: BaseException) -> Verdict:
    """The verdict on an error that a clip ended with.

    | code | means |
    |---|---|
    | ``invalid_request`` | the model cannot do what was asked for |
    | ``nobody_watches`` | whoever wanted to watch a live stream has gone before anything of it was there |
    | ``out_of_memory`` | there was not enough memory; the process ends, because what it holds is in disorder |
    | ``gpu_failed`` | the GPU reported an error; the process ends, because it cannot use the GPU any more |
    | ``disk_full`` | the clip did not fit on the disk |
    | ``bundle_damaged`` | the bundle is incomplete or damaged |
    | ``resources_lacking`` | this machine lacks something else, such as memory for a clip of this size |
    | ``internal_error`` | anything else |

    The supervisor adds ``worker_died``, ``worker_hung`` and the codes of a `StorageError`.
    """
    said = str(error)
    if _is_of_memory(error):
        message = "memory ran out; ask for a smaller or shorter clip, or for fewer at once"
        return Verdict(Failure("out_of_memory", message), True)
    if isinstance(error, GpuError) or (is_of_a_library(error) and GPU_FAILED.search(said)):
        message = "the GPU reported an error, and its worker was started anew; try again"
        return Verdict(Failure("gpu_failed", message), True)
    if isinstance(error, NobodyWatchesError):
        return Verdict(Failure("nobody_watches", str(error)), False)
    if isinstance(error, RequestError | ConfigError):
        return Verdict(Failure("invalid_request", without_paths(str(error))), False)
    if (isinstance(error, OSError) and error.errno in DISK_FULL) or "No space left on device" in said:
        return Verdict(Failure("disk_full", "the disk of the server is full; try again later"), False)
    if isinstance(error, BundleError | CheckpointError):
        message = "the model is incomplete or damaged on the server; its log says what is wrong"
        return Verdict(Failure("bundle_damaged", message), False)
    if isinstance(error, WanforgeError):
        return Verdict(Failure("resources_lacking", without_paths(message_of(error))), False)
    message = f"the server failed ({type(error).__name__}); its log says more"
    return Verdict(Failure("internal_error", message), False)


def without_paths(text: str) -> str:
    """A message for clients, who need not know where the server has its files."""
    return PATH.sub("a file of the server", text)


def _is_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, here or in the video encoder."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return (is_of_a_library(error) or isinstance(error, ResourceError)) and bool(OUT_OF_MEMORY.search(str(error)))
