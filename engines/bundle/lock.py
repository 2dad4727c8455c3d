"""Locks on a bundle, by which processes and threads agree who may use its files and who may change them.

    .lock            shared: the files are in use; exclusive: files are being replaced or deleted
    .manifest.lock   exclusive: the manifest is being changed

Whoever needs both takes them in this order. The system ends the locks of a process when the process ends, however it
ends. Where nothing can be written and there is no lock file, nobody can change anything either, and nothing is locked.
"""

import errno
import fcntl
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wanforge.errors import BundleError

FILES_LOCK, MANIFEST_LOCK = ".lock", ".manifest.lock"
KERNEL_LOCKS = Path("/proc/locks")
UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}

log = logging.getLogger("wanforge.bundle")


class FilesLock:
    """This process's lock on the files of one bundle. All of its threads share it; those that change files take turns.

    A thread that changes files waits for other processes that use them, but not for other users in its own process.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._turn = threading.RLock()
        self._descriptor: int | None = None
        self._users = self._changes = 0

    def share(self) -> None:
        """Announce a use of the files. Waits for processes that change them."""
        with self._turn:
            self._open()
            if not self._users and not self._changes:
                self._lock(fcntl.LOCK_SH)
            self._users += 1

    def release(self) -> None:
        """End a use of the files."""
        with self._turn:
            self._users -= 1
            self._settle()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from using the files while a ``with`` block changes them."""
        with self._turn:
            self._open()
            if not self._changes:
                self._lock(fcntl.LOCK_EX)
            self._changes += 1
            try:
                yield
            finally:
                self._changes -= 1
                self._settle()

    def _open(self) -> None:
        if not self._users and not self._changes:
            self._descriptor = open_lock(self.root / FILES_LOCK)

    def _lock(self, kind: int) -> None:
        try:
            lock(self._descriptor, kind, self.root)
        except BaseException:
            self._settle()
            raise

    def _settle(self) -> None:
        """Hold no more than what is still needed."""
        if self._descriptor is None or self._changes:
            return
        if self._users:
            lock(self._descriptor, fcntl.LOCK_SH, self.root)
        else:
            os.close(self._descriptor)
            self._descriptor = None


_files_locks: dict[Path, FilesLock] = {}
os.register_at_fork(after_in_child=_files_locks.clear)


def files_lock(root: Path) -> FilesLock:
    """The lock of this process on a bundle's files."""
    return _files_locks.setdefault(root.resolve(), FilesLock(root.resolve()))


def hold(root: Path) -> Callable[[], None]:
    """Announce a use of a bundle's files, once no process changes them, and return the function that ends it."""
    lock_of_files = files_lock(root)
    lock_of_files.share()
    return lock_of_files.release


@contextmanager
def shared(root: Path) -> Iterator[None]:
    """Use a bundle's files in a ``with`` block. Waits for processes that change them."""
    release = hold(root)
    try:
        yield
    finally:
        release()


@contextmanager
def recording(root: Path) -> Iterator[None]:
    """Keep other processes and threads from changing a bundle's manifest while a ``with`` block changes it."""
    descriptor = open_lock(root / MANIFEST_LOCK)
    try:
        lock(descriptor, fcntl.LOCK_EX, root)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def open_lock(path: Path) -> int | None:
    """Open a lock file, and make it if it is not there; None where it is not there and cannot be made.

    Raises:
        BundleError: It is not a regular file.
    """
    common = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | common, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise BundleError(f"{path}: is not a lock file but a link, a folder or a device; remove it") from None
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        try:
            descriptor = os.open(path, os.O_RDONLY | common)
        except OSError:
            return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{path}: is not a lock file but a link, a folder or a device; remove it")
    return descriptor


def lock(descriptor: int | None, kind: int, root: Path) -> None:
    """Lock an open file. Where another process has to end something first, say so and wait."""
    if descriptor is None:
        return
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("%s is in use by %s; waiting for it", root, holders(descriptor))
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("%s lies on a disk that knows no locks; do not change it from two processes at once", root)


def holders(descriptor: int) -> str:
    """The processes that hold a lock on an open file, for people to read."""
    inode = os.fstat(descriptor).st_ino
    names = []
    for line in KERNEL_LOCKS.read_text().splitlines() if KERNEL_LOCKS.exists() else ():
        fields = line.split()  # 1: FLOCK ADVISORY WRITE 1234 08:01:5678 0 EOF
        if len(fields) == 8 and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
            names.append(_process(int(fields[4])))
    return " and ".join(dict.fromkeys(names)) or "another process"


def _process(number: int) -> str:
    """A process by its number, with the command if it is one of wanforge."""
    import psutil

    try:
        words = [Path(word).name for word in psutil.Process(number).cmdline()]
    except (psutil.Error, ValueError):
        words = []
    command = " ".join(words[words.index("wanforge") :][:2]) if "wanforge" in words else ""
    return f"process {number}" + (f" ({command})" if command else "") if number > 0 else "another process"
