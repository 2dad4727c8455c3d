"""The errors that a user can cause. Each message says what is wrong, what was found, and what to do.

    WanforgeError
    ├── ConfigError        a TOML file, a model, target or recipe name, a resolution or frame count
    ├── CheckpointError    a file that upstream publishes: missing, truncated, from another model
    ├── BundleError        a bundle: incomplete, damaged, stale
    ├── RequestError       one generation request: prompt, image, steps, top-k
    ├── ShapeError         tensors handed to an op or a module
    ├── ResourceError      this machine: disk, memory, a package that is not installed
    └── GpuError           an error of the GPU, after which the process cannot use it any more

The command line prints them without a traceback and exits with 1; click's usage errors exit with 2.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class WanforgeError(Exception):
    """Base of all errors that a user can cause and fix."""

    field: str = ""
    """The part of a request that is wrong, where that is known; see `runtime.request.concerning`."""


class ConfigError(WanforgeError, ValueError):
    """A configuration file or a name in it does not make sense."""


class CheckpointError(WanforgeError):
    """A checkpoint file is missing, damaged, or not what the user said it was."""


class BundleError(WanforgeError):
    """A bundle is incomplete, damaged or stale."""


class RequestError(WanforgeError):
    """A generation request cannot be served as asked."""


class ShapeError(WanforgeError, ValueError):
    """Tensors do not fit an op or a module."""


class ResourceError(WanforgeError):
    """This machine lacks disk, memory or a package."""


class GpuError(WanforgeError):
    """The GPU reported an error. The process cannot use it any more."""


def join_names(names: Sequence[str]) -> str:
    """Names for a message: the first few, and how many more there are."""
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """The message for an unknown name: the nearest known name, then all of them."""
    near = get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"no {kind} is called {name!r}; {hint}known: {', '.join(known)}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the operating system that name no file, as those of writing do, name this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def message_of(error: WanforgeError | OSError) -> str:
    """The message for a user: what is wrong, where, and what to do."""
    if isinstance(error, WanforgeError):
        return str(error)
    where = f" at {error.filename}" if error.filename else ""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "free some space or choose another place" if is_full else "check the path and its permissions"
    return f"{error.strerror}{where}; {advice}"
