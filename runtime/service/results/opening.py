"""Which object storage the service uses."""

from pathlib import Path

from wanforge.errors import ConfigError
from wanforge.runtime.service.results.base import ObjectStorage
from wanforge.runtime.service.results.folder import FolderStorage

S3 = "s3://"


def open_storage(place: str, data: Path) -> ObjectStorage:
    """The object storage at a place.

    Args:
        place: ``s3://bucket/prefix``, a folder, or empty for a folder in `data`.
        data: The folder of the service.

    Raises:
        ConfigError: There is no storage of this kind.
        StorageError: It cannot be opened.
        ResourceError: obstore is not installed.
    """
    if place.startswith(S3):
        from wanforge.runtime.service.results.s3 import S3Storage

        return S3Storage(place, data / "cache")
    if "://" in place:
        raise ConfigError(f"results is {place!r}; results can be kept in a folder, or in S3: {S3}bucket/prefix")
    return FolderStorage(Path(place) if place else data / "results")
