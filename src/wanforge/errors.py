"""The errors that a user can cause. Each message says what is wrong, what was found, and what to do.

    WanforgeError
    ├── ConfigError        a TOML file, a model, target or recipe name, a resolution or frame count
    ├── CheckpointError    a file that upstream publishes: missing, truncated, from another model
    ├── BundleError        a bundle: incomplete, damaged, stale
    ├── RequestError       one generation request: prompt, image, steps, top-k
    ├── ShapeError         tensors handed to an op or a module
    └── ResourceError      this machine: disk, memory, a package that is not installed

The command line prints them without a traceback and exits with 1; click's usage errors exit with 2.
"""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

OUT_OF_MEMORY = re.compile(r"(?i)(can't|cannot|failed to) allocate memory|bad.?alloc|out of memory|can't start.*thread")
"""How PyTorch, ONNX Runtime and Python word a failed allocation, for which they have no exception type."""


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
def memory_errors() -> Iterator[None]:
    """Turn the out-of-memory errors of every library into a `ResourceError`."""
    try:
        yield
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise _out_of_memory(str(error)) from error
    except Exception as error:
        of_a_library = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
        if not of_a_library or (found := OUT_OF_MEMORY.search(str(error))) is None:
            raise
        raise _out_of_memory(str(error)[found.start() :]) from error


def _out_of_memory(reason: str) -> ResourceError:
    said = f" ({reason[:120].strip()})" if reason else ""
    return ResourceError(f"memory ran out{said}; free some, or ask for a smaller or shorter clip")


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
