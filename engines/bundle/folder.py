"""Files in the folder of a bundle, reached without following links out of it."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import msgspec

from wanforge.errors import BundleError

MOST_BYTES = 64 << 20
"""Largest JSON file that is read: a hundred times the size of a manifest with engines for every GPU and many clips."""

UNREADABLE = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError)
"""The exceptions that reading a damaged JSON file raises."""


def read_unlinked(path: Path) -> bytes:
    """The bytes of a small file of a bundle. A link is not followed, and a device is not read.

    Raises:
        BundleError: It is not a regular file, or is larger than any that a bundle has.
        OSError: It cannot be opened.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BundleError(f"{path}: is not a file but a link, a folder or a device; remove it")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise BundleError(f"{path}: damaged, it has more than {MOST_BYTES:,} bytes")
    return data


def check_names(names: Iterable[str]) -> None:
    """Refuse names of files that do not lie in a bundle.

    Raises:
        ValueError: One of them is no relative path, or leads out of the bundle.
    """
    for name in names:
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"{name!r} lies outside the bundle")


def inside(root: Path, name: str) -> Path:
    """The path of a file in a bundle, whose folders must not be links.

    Raises:
        BundleError: A folder on the way is a link, so that the file lies outside.
    """
    folder = root
    for part in PurePosixPath(name).parts[:-1]:
        folder = folder / part
        if folder.is_symlink():
            raise BundleError(f"{folder}: is a link, and the folders of a bundle are its own; remove it")
    return root / name
