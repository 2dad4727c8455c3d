"""Objects in S3, or in a store that speaks its protocol."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanforge.errors import ResourceError
from wanforge.requirements import install_extra
from wanforge.runtime.service.results.base import NAME, ObjectStorage, StorageError, Stored, checked_name
from wanforge.runtime.service.results.folder import STAGING, FolderStorage, explained
from wanforge.whole_file import temporary_file

MOST_CACHED = 4_000_000_000
"""Bytes of downloaded objects that are kept on this machine."""


class S3Storage(ObjectStorage):
    """Objects in a bucket. Those that are asked for lie in a cache on this machine, too.

    Where the bucket is and who asks is taken from the environment, by AWS's names: ``AWS_ENDPOINT_URL``,
    ``AWS_REGION``, ``AWS_ACCESS_KEY_ID`` and so on.

    Args:
        url: ``s3://bucket/prefix``.
        cache: A folder of this machine.
        settings: What obstore needs to know besides the environment.

    Raises:
        ResourceError: obstore is not installed.
        StorageError: The URL or the environment makes no sense.
    """

    def __init__(self, url: str, cache: Path, settings: Mapping[str, Any] | None = None) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import S3Store
        except ImportError:
            raise ResourceError(f"results in S3 need obstore; run: {install_extra('s3')}") from None
        self._obstore, self._error, self.url, self.cache = obstore, BaseError, url, FolderStorage(cache)
        with self._explained():
            self._store = S3Store.from_url(url, **(settings or {}))

    def put(self, name: str, data: bytes) -> None:
        with self._explained():
            self._obstore.put(self._store, checked_name(name), data)

    def add(self, name: str, path: Path) -> None:
        with self._explained():
            self._obstore.put(self._store, checked_name(name), path)
        path.unlink(missing_ok=True)

    def local(self, name: str) -> Path:
        path = self.cache.root / checked_name(name)
        if path.is_file():
            os.utime(path)  # it is used now
            return path
        with explained(self.cache.root), temporary_file(path) as temporary:
            with self._explained(), temporary.open("wb") as file:
                for part in self._obstore.get(self._store, name):
                    file.write(part)
            os.replace(temporary, path)
        self._trim(path)
        return path

    def delete(self, names: Collection[str]) -> None:
        self.cache.delete(names)
        with self._explained(), _unless_missing():
            if names:
                self._obstore.delete(self._store, [checked_name(name) for name in names])

    def stored(self) -> Iterator[Stored]:
        with self._explained():
            for part in self._obstore.list(self._store):
                for each in part:
                    if NAME.fullmatch(each["path"]):
                        yield Stored(each["path"], each["last_modified"].timestamp(), each["size"])

    def staging(self) -> Path:
        return self.cache.root / STAGING

    def check_room(self) -> None:
        self.cache.check_room()

    def _trim(self, kept: Path) -> None:
        """Delete the copies that were not used for longest."""
        copies = sorted(self.cache.stored(), key=lambda each: each.changed_at)
        excess = sum(each.bytes for each in copies) - MOST_CACHED
        for each in copies:
            if excess > 0 and each.name != kept.name:
                self.cache.delete([each.name])
                excess -= each.bytes

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn obstore's errors into a `StorageError`."""
        try:
            yield
        except FileNotFoundError:
            raise StorageError("object_gone", f"{self.url}: the object is not there any more") from None
        except (self._error, ValueError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StorageError("storage_unreachable", f"{self.url}: {said}") from None


@contextmanager
def _unless_missing() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        return
