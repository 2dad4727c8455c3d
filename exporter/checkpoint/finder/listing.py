"""List the checkpoint files in folders without opening any of them.

A walk goes a few levels deep, follows links to files but not to folders, and takes no files but regular ones. A
repository in the cache of huggingface_hub is entered at its current snapshot
(Source: https://huggingface.co/docs/hub/local-cache).
"""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from wanforge.engines.bundle.bundle import WEIGHTS
from wanforge.engines.bundle.manifest import IMPORT, MANIFEST
from wanforge.engines.bundle.remedies import import_command
from wanforge.errors import BundleError, CheckpointError, join_names
from wanforge.exporter.checkpoint.reader import INDEX

CONTAINERS = (".safetensors", ".pth", ".pt", ".gguf")
"""The ends of names of files that hold the weights of a component."""
UNREAD = (".bin", ".ckpt")
"""The ends of names of files that hold weights, but are not imported."""
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
COMMIT = re.compile(r"[0-9a-zA-Z]+")

MOST_LEVELS = 4
"""How many levels of folders below the given one are looked into."""
MOST_ENTRIES = 20_000
"""How many files and folders are looked at for each given folder."""


@dataclass(frozen=True)
class Listing:
    """The files of some folders, in the order of the folders and then from the outermost level inwards.

    Attributes:
        checkpoints: Files that may hold the weights of a component; for a sharded checkpoint, its index.
        tokenizers: Files called ``tokenizer.json``.
        unread: Files that hold weights in a form that is not imported.
    """

    checkpoints: list[Path] = field(default_factory=list)
    tokenizers: list[Path] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)


def list_folders(folders: Sequence[Path], out: Path) -> Listing:
    """List the files in folders, without those of bundles and of the folder that is going to be written.

    Raises:
        CheckpointError: A folder does not exist, holds nothing of use or far too much, or is `out`.
        BundleError: A folder is a bundle, finished or not.
    """
    listing = Listing()
    seen: set[str] = set()
    for folder in folders:
        check_folder(folder, out)
        files = [path for path in walk(current_snapshot(folder), out) if os.path.abspath(path) not in seen]
        seen |= {os.path.abspath(path) for path in files}
        _sort_into(listing, files)
    if folders and not (listing.checkpoints or listing.tokenizers):
        others = f"; it has {join_names([path.name for path in listing.unread])}" if listing.unread else ""
        raise CheckpointError(
            f"{join_names([str(f) for f in folders])}: no checkpoint files here (names that end in "
            f"{', '.join(CONTAINERS)}), down to {MOST_LEVELS} folders deep{others}; give the folder that holds them"
        )
    return listing


def _sort_into(listing: Listing, files: Sequence[Path]) -> None:
    indexed = {path.parent for path in files if path.name.endswith(INDEX)}
    for path in files:
        is_shard = SHARD.search(path.name) is not None
        if path.name == "tokenizer.json":
            listing.tokenizers.append(path)
        elif path.name.endswith((INDEX, *CONTAINERS)) and not is_shard:
            listing.checkpoints.append(path)
        elif path.suffix in UNREAD or (is_shard and path.parent not in indexed):
            listing.unread.append(path)


def check_folder(folder: Path, out: Path) -> None:
    """Refuse what is no folder of checkpoint files."""
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is a file; give the folder that holds it, or the file itself with --dit, --dit-low, --vae, "
            "--text-encoder or --tokenizer"
        )
    if is_bundle(folder) and (folder / MANIFEST).is_file():
        raise BundleError(
            f"{folder}: is a bundle already and needs no import; next: wanforge inspect {shlex.quote(str(folder))}"
        )
    if is_bundle(folder):
        raise BundleError(
            f"{folder}: is a bundle whose import was interrupted; continue it with: {import_command(folder)}"
        )
    if folder.resolve() == out.resolve():
        raise CheckpointError(f"{folder}: holds the checkpoint files; choose another folder for the bundle (--out)")


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, or what an interrupted import left of one."""
    with suppress(OSError):
        return (folder / IMPORT).is_file() or ((folder / MANIFEST).is_file() and (folder / WEIGHTS).is_dir())
    return False


def walk(root: Path, out: Path) -> Iterator[Path]:
    """Yield the regular files below a folder, level by level and sorted.

    Hidden folders, bundles, folders that cannot be read and `out` are left out.

    Raises:
        CheckpointError: There are too many entries.
    """
    level, left = [root], MOST_ENTRIES
    for _ in range(MOST_LEVELS + 1):
        below: list[Path] = []
        for folder in level:
            entries: list[os.DirEntry[str]] = []
            with suppress(PermissionError):
                entries = _entries(folder, left + 1)
            left -= len(entries)
            if left < 0:
                raise CheckpointError(
                    f"{root}: holds more than {MOST_ENTRIES:,} files and folders; give the folder that holds the "
                    "checkpoint files themselves"
                )
            for entry in entries:
                if _is_file(entry):
                    yield folder / entry.name
                elif entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    below.append(folder / entry.name)
        level = [current_snapshot(f) for f in below if not is_bundle(f) and f.resolve() != out.resolve()]


def _entries(folder: Path, most: int = MOST_ENTRIES) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(islice(entries, most), key=lambda entry: entry.name)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file or a link to one."""
    with suppress(OSError):  # links in a circle
        return entry.is_file()
    return False


def current_snapshot(folder: Path) -> Path:
    """The current snapshot, if `folder` is a repository in the cache of huggingface_hub; otherwise `folder` itself.

    Raises:
        CheckpointError: There is no snapshot, or none of several is the current one.
    """
    snapshots = folder / "snapshots"
    if not folder.absolute().name.startswith("models--") or not snapshots.is_dir():
        return folder
    main = folder / "refs" / "main"
    if main.is_file():
        with main.open("rb") as file:
            commit = file.read(256).decode(errors="replace").strip()
        if COMMIT.fullmatch(commit) and (snapshots / commit).is_dir():
            return snapshots / commit
    found = [entry.name for entry in _entries(snapshots) if entry.is_dir(follow_symlinks=False)]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder}: its refs/main names no snapshot that is here, and there are {len(found)} in {snapshots} "
            f"({join_names(found) or 'none'}); give one of them, or download the repository again"
        )
    return snapshots / found[0]
