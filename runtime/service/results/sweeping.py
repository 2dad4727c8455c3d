"""Deleting objects that nobody needs any more."""

import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from wanforge.runtime.service.results.base import ObjectStorage
from wanforge.runtime.service.store.base import JobStore

GRACE_SECONDS = 86_400.0
"""How long an object may be stored without a job: an upload whose job is about to be submitted, or a result whose job
is about to be completed."""


def delete_removable(storage: ObjectStorage, store: JobStore) -> int:
    """Delete the objects that the job store lets go. It names them until they are gone, so a process that is killed in
    between leaves nothing behind. Returns their number.

    Raises:
        StorageError, StoreError: The storage or the store cannot be reached.
    """
    count = 0
    while names := store.removable():
        storage.delete(names)
        store.removed(names)
        count += len(names)
    return count


def delete_orphans(storage: ObjectStorage, store: JobStore, grace_seconds: float = GRACE_SECONDS) -> list[str]:
    """Delete objects that the job store does not know and that are old enough. Returns their names.

    Raises:
        StorageError, StoreError: The storage or the store cannot be reached.
    """
    before = time.time() - grace_seconds
    old = [each.name for each in storage.stored() if each.changed_at <= before]
    orphans = sorted(set(old) - store.known(old))
    storage.delete(orphans)
    return orphans


def staging_name(lease_name: str, attempt: str = "") -> str:
    """The name of the folder in which the child of a worker makes a clip; without an attempt, what the names of all its
    folders begin with."""
    return f"{lease_name.replace('/', '-')}-{attempt}"


def delete_unfinished(staging: Path, lease_names: Collection[str]) -> None:
    """Delete the files of clips that were not finished: those of some workers, which have ended, and whatever is old.
    Other services may be making clips in the same folder."""
    staging.mkdir(mode=0o700, parents=True, exist_ok=True)
    before, ended = time.time() - GRACE_SECONDS, tuple(staging_name(name) for name in lease_names)
    for folder in staging.iterdir():
        with suppress(FileNotFoundError):
            if folder.name.startswith(ended) or folder.stat().st_mtime < before:
                shutil.rmtree(folder, ignore_errors=True)
