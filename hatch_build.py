"""A hook of hatchling that puts the links of ``src/wanforge`` into the sdist.

Hatchling packs each folder once, under its real name, and leaves out the links to it. Without them neither an editable
install nor the tests work in an unpacked sdist.
"""

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path("src", "wanforge")


class SdistLinks(BuildHookInterface):
    """Adds the links after the sdist has been written."""

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        path = Path(artifact_path)
        content = io.BytesIO(gzip.decompress(path.read_bytes()))
        with tarfile.open(fileobj=content, mode="a") as archive:
            first = archive.getmembers()[0]
            for link in sorted(Path(self.root, PACKAGE).iterdir()):
                if link.is_symlink():
                    member = tarfile.TarInfo(str(Path(first.name.partition("/")[0], PACKAGE, link.name)))
                    member.type, member.linkname, member.mtime = tarfile.SYMTYPE, str(link.readlink()), first.mtime
                    archive.addfile(member)
        path.write_bytes(gzip.compress(content.getvalue(), mtime=first.mtime))
