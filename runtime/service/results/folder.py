"""Objects as the files of a folder."""

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from wanforge.runtime.service.results.base import NAME, ObjectStorage, StorageError, Stored, checked_name
from wanforge.whole_file import temporary_file

LEAST_FREE = 1_000_000_000
"""Bytes that stay free on the disk: the job store has to be able to write what became of its jobs."""

STAGING = "staging"
FULL = (errno.ENOSPC, errno.EDQUOT)


class FolderStorage(ObjectStorage):
    """Objects in a folder of this machine, or of a network file system.

    Args:
        root: The folder; it is made if it does not exist.
        least_free: Bytes that have to be free on the disk before something is uploaded or a job is started. Results of
            jobs that run already may take some of them.
        is_private: Whether only this user may look into it.
        staging: The name of the folder within it in which files are made.
    """

    def __init__(
        self, root: Path, least_free: int = LEAST_FREE, *, is_private: bool = True, staging: str = STAGING
    ) -> None:
        self.root, self.least_free, self._staging = root, least_free, root / staging
        with explained(root):
            self.staging().mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private:
                root.chmod(0o700)

    def put(self, name: str, data: bytes) -> None:
        path = self.root / checked_name(name)
        self.check_room()
        with explained(self.root), temporary_file(path) as temporary:
            temporary.write_bytes(data)
            self._place(temporary, path)

    def add(self, name: str, path: Path) -> None:
        target = self.root / checked_name(name)
        with explained(self.root):
            if path.stat().st_dev == self.root.stat().st_dev:
                self._place(path, target)
                return
            with temporary_file(target) as temporary:
                shutil.copyfile(path, temporary)
                self._place(temporary, target)

    def local(self, name: str) -> Path:
        path = self.root / checked_name(name)
        if not path.is_file():
            raise StorageError("object_gone", f"the object {name} is not there any more")
        return path

    def delete(self, names: Collection[str]) -> None:
        with explained(self.root):
            for name in names:
                (self.root / checked_name(name)).unlink(missing_ok=True)

    def stored(self) -> Iterator[Stored]:
        with explained(self.root), os.scandir(self.root) as entries:
            for entry in entries:
                if NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    yield Stored(entry.name, found.st_mtime, found.st_size)

    def staging(self) -> Path:
        return self._staging

    def check_room(self) -> None:
        free = shutil.disk_usage(self.root).free
        if free < self.least_free:
            raise StorageError(
                "disk_full",
                f"{self.root}: {free / 1e9:.2f} GB are free, and {self.least_free / 1e9:.2f} GB have to stay free; "
                "free some space, or keep results for a shorter time",
            )

    def _place(self, file: Path, target: Path) -> None:
        """Give a complete file its name once it is on the disk."""
        _sync(file)
        os.replace(file, target)
        _sync(self.root)


def _sync(path: Path) -> None:
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


@contextmanager
def explained(root: Path) -> Iterator[None]:
    """Turn errors of the operating system into a `StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError("disk_full", f"{root}: its disk is full; free some space") from None
        said = error.strerror or error
        raise StorageError("storage_refused", f"{root}: {said}; check the folder and its permissions") from None
