"""Writing files so that they are either complete or absent.

A file is written under a temporary name of its own in its final folder and then renamed. The name is new, so that two
processes never write to one file, and no link is followed. A process that is killed leaves its temporary file behind.
The lock that it held on the file ends with it, by which the next process that writes the same file recognises what was
left, and deletes it.
"""

import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wanforge.errors import RequestError
from wanforge.regular_file import KINDS

PARTIAL = ".partial"
"""The part of a temporary name that no complete file has."""

NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""The errors of locking on a disk that knows no locks."""

FOLDER_LOCK = Path("wanforge.lock")
"""The file whose temporary names lie beside temporary folders."""

LONGEST_NAME = 255
"""The most bytes of a file's name, on the usual file systems."""

open_files: set[Path] = set()
"""The temporary files of this process, which are deleted if it has to end at once."""

open_folders: set[Path] = set()
"""Its temporary folders, likewise."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file under a temporary name and rename it once it is on disk. Creates its folder."""
    with temporary_file(path) as temporary:
        with temporary.open("r+b") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Make an empty file beside `path`, with its suffix; whoever fills it renames it, and otherwise it is deleted.

    Raises:
        OSError: No file can be written there. The error names `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(path)
        temporary, held = _create(path)
    except OSError as error:
        error.filename = str(path)
        raise
    open_files.add(temporary)
    try:
        yield temporary
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        open_files.discard(temporary)
        os.close(held)


@contextmanager
def temporary_folder(within: Path | None = None) -> Iterator[Path]:
    """Make a folder for temporary files, into which only this user may look and which is deleted with everything in it.

    Beside it lies a temporary file. A process that is killed leaves both behind; the next one deletes the file, whose
    lock is free, and then the folders that have no such file.

    Args:
        within: The folder in which to make it; by default the one for temporary files.
    """
    within = within or Path(tempfile.gettempdir())
    with temporary_file(within / FOLDER_LOCK) as locked:
        for left in within.glob(f".{FOLDER_LOCK.stem}.*{PARTIAL}"):
            if not left.with_suffix(f"{PARTIAL}{FOLDER_LOCK.suffix}").exists():
                shutil.rmtree(left, ignore_errors=True)
        folder = locked.with_suffix("")
        open_folders.add(folder)
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            open_folders.discard(folder)


def check_writable(path: Path) -> None:
    """Make the folder of a file that is to be written, and check that it can be written there.

    Raises:
        RequestError: The path is that of a folder, a device or a pipe.
        OSError: No file can be written there. The error names `path`.
    """
    check_kind(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, held = _create(path)
    except OSError as error:
        error.filename = str(path)
        raise
    temporary.unlink(missing_ok=True)
    os.close(held)


@contextmanager
def folders_as_before(paths: Iterable[Path]) -> Iterator[None]:
    """Delete the folders of files that the block makes, unless something is in them by then."""
    missing = {folder for path in paths for folder in path.absolute().parents if not folder.exists()}
    try:
        yield
    finally:
        for folder in sorted(missing, reverse=True):  # those within others first
            with suppress(OSError):
                folder.rmdir()


def check_appendable(path: Path) -> None:
    """Make the folder of a file to which lines are to be added, and check that this is possible.

    Raises:
        RequestError: The path is that of a folder, a device or a pipe.
        OSError: Nothing can be written there. The error names `path`.
    """
    check_kind(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink()


def check_kind(path: Path) -> None:
    """Check that a path is that of an ordinary file, or of nothing yet. A link to the standard output is neither.

    Raises:
        RequestError: It is that of a folder, a device or a pipe.
        OSError: No file can have this name.
    """
    with suppress(FileNotFoundError):
        kind = stat.S_IFMT(path.stat().st_mode)
        if kind != stat.S_IFREG or path.parent == Path("/dev"):
            raise RequestError(f"{path}: is {KINDS.get(kind, 'a device')}; give the name of a file")


def _create(path: Path) -> tuple[Path, int]:
    """Make a temporary file under a new name and lock it until it is closed."""
    while True:
        temporary = path.with_name(f"{_beginning(path)}{secrets.token_hex(4)}{PARTIAL}{path.suffix}")
        held = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o666)
        try:
            if _is_ours(held):
                return temporary, held
        except BaseException:
            os.close(held)
            temporary.unlink(missing_ok=True)
            raise
        os.close(held)


def _is_ours(held: int) -> bool:
    """Lock a new file, and return whether no other process took it for a leftover before it was locked."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:  # without locks, no other process takes it for a leftover
            raise
    return bool(os.fstat(held).st_nlink)


def _beginning(path: Path) -> str:
    """What the temporary names of a file begin with: its own name, as much of it as there is room for."""
    room = LONGEST_NAME - len(os.fsencode(f"..{'0' * 8}{PARTIAL}{path.suffix}"))
    return f".{os.fsencode(path.stem)[:room].decode(errors='ignore')}."


def delete_leftovers(path: Path) -> None:
    """Delete the temporary files of `path` whose processes have ended."""
    prefix, suffix = _beginning(path), f"{PARTIAL}{path.suffix}"
    for name in os.listdir(path.parent):
        if name.startswith(prefix) and name.endswith(suffix) and len(name) == len(prefix) + 8 + len(suffix):
            delete_if_left(path.parent / name)


def delete_if_left(temporary: Path) -> None:
    """Delete a temporary file unless a process holds the lock on it."""
    with suppress(OSError):
        held = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink(missing_ok=True)
        finally:
            os.close(held)
