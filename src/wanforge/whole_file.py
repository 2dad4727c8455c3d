"""Writing files so that they are either complete or absent."""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file under a temporary name and rename it once it is on disk. Creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
