"""What an object storage does.

An object is there as a whole or not at all, and does not change. Its name is random, so that nobody can guess it and no
part of it comes from a client. The storage knows nothing of jobs: the job store says which objects are still needed.
"""

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path

from wanforge.configs.loading import Record
from wanforge.errors import ResourceError

NAME = re.compile(r"[0-9a-f]{16,64}\.[a-z0-9]{1,8}")
"""What the name of an object looks like."""
MANIFEST = "manifest.jsonl"
"""The one other name that can be stored: that of the list of a batch, which belongs to no job."""


class StorageError(ResourceError):
    """The object storage cannot do what it was asked to. Nothing of it has happened.

    Attributes:
        code: ``disk_full``, ``object_gone``, ``storage_refused`` or ``storage_unreachable``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stored(Record, frozen=True):
    """An object that is stored.

    Attributes:
        changed_at: Seconds since 1970.
    """

    name: str
    changed_at: float
    bytes: int


def new_name(suffix: str) -> str:
    """A name for an object that no other has.

    Args:
        suffix: The kind of file, with its dot: ``.mp4``.
    """
    return f"{secrets.token_hex(16)}{suffix}"


def checked_name(name: str) -> str:
    """The name itself, if it is that of an object and not of another file.

    Raises:
        StorageError: It is not.
    """
    if name != MANIFEST and not NAME.fullmatch(name):
        raise StorageError("object_gone", f"there is no object {name!r}")
    return name


class ObjectStorage(ABC):
    """Objects by name. Every thread and every process can use one.

    Every method raises a `StorageError` for a name that no object can have.
    """

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Store an object. When this returns, it survives a power failure.

        Raises:
            StorageError: There is no room, or the storage cannot be reached.
        """

    @abstractmethod
    def add(self, name: str, path: Path) -> None:
        """Store a file as an object, whereby the file may be moved.

        Raises:
            StorageError: There is no room, or the storage cannot be reached.
        """

    @abstractmethod
    def local(self, name: str) -> Path:
        """A file of this machine with the contents of an object, which must not be changed.

        Raises:
            StorageError: The object is gone, or the storage cannot be reached.
        """

    @abstractmethod
    def delete(self, names: Collection[str]) -> None:
        """Delete objects; those that are gone already are no error.

        Raises:
            StorageError: The storage cannot be reached, or refuses it.
        """

    @abstractmethod
    def stored(self) -> Iterator[Stored]:
        """All objects, in any order.

        Raises:
            StorageError: The storage cannot be reached.
        """

    @abstractmethod
    def staging(self) -> Path:
        """A folder of this machine in which files are made before `add` takes them."""

    @abstractmethod
    def check_room(self) -> None:
        """Make sure that there is room for more.

        Raises:
            StorageError: There is not.
        """
