"""What was fetched from a repository: the commit, and the size and hash of each file, in a file beside them.

Where the hash of a file is not known beforehand, the first pull notes it, and later ones expect it.
"""

from pathlib import Path
from typing import Literal

import msgspec
from msgspec import field

from wanforge.configs.loading import Record
from wanforge.errors import CheckpointError
from wanforge.regular_file import check_regular
from wanforge.whole_file import write_atomically

NAME = "pulled.json"
MOST_BYTES = 1 << 20
"""The largest size of a record, far above that of any."""


class PulledFile(Record, frozen=True):
    """A file as it was fetched."""

    bytes: int
    sha256: str


class PullRecord(Record, frozen=True):
    """What was fetched from a repository.

    Attributes:
        commit: The commit that all files are from.
        files: By their paths in the repository.
    """

    repository: str
    commit: str
    files: dict[str, PulledFile] = field(default_factory=dict)
    version: Literal[1] = 1

    def adding(self, path: str, file: PulledFile) -> "PullRecord":
        """The record with one more file."""
        return msgspec.structs.replace(self, files={**self.files, path: file})


def read_pull(folder: Path) -> PullRecord | None:
    """The record of a folder; None if nothing was fetched into it.

    Raises:
        CheckpointError: The record cannot be read.
    """
    path = folder / NAME
    if not path.exists():
        return None
    check_regular(path, CheckpointError, MOST_BYTES)
    try:
        return msgspec.json.decode(path.read_bytes(), type=PullRecord)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: {error}; delete it, and the files beside it are checked anew") from None


def write_pull(folder: Path, record: PullRecord) -> None:
    """Replace the record of a folder."""
    write_atomically(folder / NAME, msgspec.json.format(msgspec.json.encode(record)))
