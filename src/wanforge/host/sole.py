"""Being the only process that does something."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wanforge.errors import ResourceError


@contextmanager
def sole(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the lock on a file, which ends with this process at the latest.

    Args:
        lock: The file, which stays, since another process may wait for it.
        refusal: What to say where another process holds it.

    Raises:
        ResourceError: Another process holds it.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(refusal) from None
        yield
