"""Threads and open files that a piece of code leaves behind."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fail if a thread or an open file is left that was not there before. What other code ends or closes in the
    meantime does not count."""
    gc.collect()
    threads, files = set(threading.enumerate()), open_files()
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in threads]
    assert not left, f"threads are left: {left}"
    opened = open_files() - files
    assert not opened, f"files are left open: {sorted(opened)}"


def open_files() -> set[tuple[int, str]]:
    """The open files of this process, by their number and what they are."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:  # The folder itself was open while it was read.
            continue
    return found
