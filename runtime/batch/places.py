"""Where a batch puts its clips: a folder, or a bucket of S3."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wanforge.host.sole import sole
from wanforge.runtime.batch.orders import DIGITS
from wanforge.runtime.service.results.base import ObjectStorage
from wanforge.runtime.service.results.folder import FolderStorage
from wanforge.runtime.service.results.opening import open_storage
from wanforge.whole_file import temporary_folder

STAGING, LOCK = ".wanforge-batch", "lock"
"""The folder beside the clips in which they are made, and the file in it that the batch that is running has locked."""
ACTOR = "actor-"
"""What the names of folders begin with in which actors make clips; those of processes are the keys of their orders."""
UNFINISHED = re.compile(rf"[0-9a-f]{{{DIGITS}}}|{ACTOR}.+")


@contextmanager
def opened(place: str) -> Iterator[ObjectStorage]:
    """The object storage of a batch, for as long as the ``with`` block runs.

    Args:
        place: A folder, or ``s3://bucket/prefix``.

    Raises:
        ConfigError: There is no storage of this kind.
        StorageError: It cannot be opened.
        ResourceError: obstore is not installed.
    """
    if "://" not in place:
        yield FolderStorage(Path(place).absolute(), least_free=0, is_private=False, staging=STAGING)
        return
    with temporary_folder() as folder:
        yield open_storage(place, folder)


@contextmanager
def sole_run(place: str, storage: ObjectStorage) -> Iterator[None]:
    """Be the only batch that writes into a folder, and delete what another one left unfinished there. In S3 there are
    no locks, so two batches that write to one place make the same clips twice.

    Raises:
        ResourceError: Another batch is running there.
    """
    staging = storage.staging()
    with sole(staging / LOCK, f"{place}: another batch is writing there; wait for its end, or give another --out"):
        delete_unfinished(staging)
        try:
            yield
        finally:
            delete_unfinished(staging)


def delete_unfinished(staging: Path) -> None:
    """Delete the folders of clips in the making. The file of the lock stays, since another batch may wait for it."""
    for left in staging.glob("*"):
        if UNFINISHED.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)
