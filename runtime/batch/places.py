"""Where a batch puts its clips: a folder, or a bucket of S3."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wanforge.errors import ResourceError
from wanforge.runtime.service.results.base import ObjectStorage
from wanforge.runtime.service.results.folder import FolderStorage
from wanforge.runtime.service.results.opening import S3, open_storage
from wanforge.whole_file import temporary_folder

LOCK = "batch.lock"


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
        yield FolderStorage(Path(place).absolute(), least_free=0, is_private=False)
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
    with (staging / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                f"{place}: another batch is writing there; wait for its end, or give another --out"
            ) from None
        for left in staging.iterdir():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        yield
    if not place.startswith(S3):
        shutil.rmtree(staging, ignore_errors=True)
