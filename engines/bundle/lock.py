"""Locks on a bundle, by which processes and threads agree who may use its files and who may change them.

    .changes.lock    exclusive: whoever has it is the only process that may ask for the second one exclusively
    .lock            shared: the files are in use; exclusive: files are being replaced or deleted
    .manifest.lock   exclusive: the manifest is being changed

Whoever needs several takes them in this order. A process that turns a shared lock into an exclusive one holds neither
while it waits; the first lock keeps the files as they are in the meantime. The system ends the locks of a process when
the process ends, however it ends. Where nothing can be written and there is no lock file, nobody can change anything
either, and nothing is locked.
"""

import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wanforge.errors import BundleError
from wanforge.whole_file import NO_LOCKS

CHANGES_LOCK, FILES_LOCK, MANIFEST_LOCK = ".changes.lock", ".lock", ".manifest.lock"
KERNEL_LOCKS = Path("/proc/locks")
WAIT_SECONDS = 0.2
"""How often a lock is asked for where the waiting is told of."""

log = logging.getLogger("wanforge.bundle")


class FilesLock:
    """This process's lock on the files of one bundle. All of its threads share it; those that change files take turns.

    A thread that changes files waits for other processes that use them, but not for other users in its own process.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._turn = threading.RLock()
        self._descriptor: int | None = None
        self._users = 0
        self._is_changing = False

    def share(self) -> None:
        """Announce a use of the files. Waits for processes that change them."""
        with self._turn:
            if not self._users and not self._is_changing:
                self._lock(fcntl.LOCK_SH)
            self._users += 1

    def release(self) -> None:
        """End a use of the files."""
        with self._turn:
            self._users -= 1
            self._settle()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from using the files while a ``with`` block changes them.

        Raises:
            BundleError: Another process is waiting to change the files until this one no longer uses them.
        """
        with self._turn:
            if self._is_changing:
                yield
                return
            with locked(self.root / CHANGES_LOCK, self.root, wait=not self._users):
                self._lock(fcntl.LOCK_EX)
                self._is_changing = True
                try:
                    yield
                finally:
                    self._is_changing = False
                    self._settle()

    def leave_to_parent(self) -> None:
        """Let go, in a child that was forked, of the lock that its parent holds."""
        self._turn = threading.RLock()  # another thread of the parent may have had its turn
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, kind: int) -> None:
        if self._descriptor is None:
            self._descriptor = open_lock(self.root / FILES_LOCK)
        try:
            lock(self._descriptor, kind, self.root)
        except BaseException:
            self._settle()
            raise

    def _settle(self) -> None:
        """Hold no more than what is still needed."""
        if self._descriptor is None or self._is_changing:
            return
        if self._users:
            lock(self._descriptor, fcntl.LOCK_SH, self.root)
        else:
            unlock(self._descriptor)
            self._descriptor = None


_files_locks: dict[Path, FilesLock] = {}


def _leave_to_parent() -> None:
    """Let go of all locks in a child that was forked."""
    for each in _files_locks.values():
        each.leave_to_parent()
    _files_locks.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


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
    with locked(root / MANIFEST_LOCK, root):
        yield


@contextmanager
def locked(path: Path, root: Path, *, wait: bool = True, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold a lock file of a bundle alone in a ``with`` block.

    Args:
        wait: Whether to wait for another process or thread that holds it.
        waiting: Called again and again while this one waits.

    Raises:
        BundleError: Another one holds it, and this one is not to wait.
    """
    descriptor, process = open_lock(path), os.getpid()
    try:
        lock(descriptor, fcntl.LOCK_EX, root, wait=wait, waiting=waiting)
        yield
    finally:
        if descriptor is not None and os.getpid() == process:
            unlock(descriptor)
        elif descriptor is not None:  # in a child that was forked
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


def lock(
    descriptor: int | None,
    kind: int,
    root: Path,
    *,
    wait: bool = True,
    waiting: Callable[[], object] | None = None,
) -> None:
    """Lock an open file. Where another process has to end something first, say so and wait.

    Raises:
        BundleError: Another process has to end something first, and this one is not to wait.
    """
    if descriptor is None:
        return
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise BundleError(
                f"{root}: {holders(descriptor)} is about to change its files and waits until this process no longer "
                "uses them; end the uses here, and try again"
            ) from None
        log.warning("%s is in use by %s; waiting for it", root, holders(descriptor))
        while waiting is not None:
            waiting()
            time.sleep(WAIT_SECONDS)
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s lies on a disk that knows no locks; do not change it from two processes at once", root)


def unlock(descriptor: int) -> None:
    """End a lock of this process, also for children that were forked and have the file open, too."""
    with suppress(OSError):  # on a disk that knows no locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


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
