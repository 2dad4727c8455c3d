"""Refusing what is no ordinary file before it is opened: a pipe waits for a writer, and a device may have no end."""

import stat
from pathlib import Path

from wanforge.errors import WanforgeError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular(path: Path, error: type[WanforgeError], most: int | None = None) -> None:
    """Refuse a path that is missing, or that leads to anything but an ordinary file. Links are followed.

    Args:
        error: The class of the error.
        most: The largest size in bytes; by default a file may have any size.

    Raises:
        WanforgeError: An `error` that names the path and what was found there.
        OSError: The path cannot be looked up.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{path}: no such file") from None
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: is {KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}; give an ordinary file")
    if most is not None and found.st_size > most:
        raise error(
            f"{path}: has {found.st_size:,} bytes, but a file of this kind has at most {most:,}; "
            "check that it is the right file"
        )
