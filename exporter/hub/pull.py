"""Fetch the files of repositories into folders, so that a file is there complete and checked, or not at all.

    FOLDER/Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth                    a file under its name in the repository
    FOLDER/Wan-AI/Wan2.1-T2V-1.3B/.Wan2.1_VAE.pth.1a2b3c4d.partial  what a pull has fetched of it so far
    FOLDER/Wan-AI/Wan2.1-T2V-1.3B/pulled.json                       the commit and the hashes, see `record`

Models that share files share the folders, too. One process at a time fetches into a folder; others wait for it.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from wanforge.configs.hub import MAIN, HubFile, HubRepository
from wanforge.engines.bundle.lock import locked
from wanforge.engines.bundle.tensorfile import sha256_of
from wanforge.errors import CheckpointError, ResourceError, WanforgeError, join_names, message_of, naming
from wanforge.exporter.hub import remote
from wanforge.exporter.hub.record import PulledFile, PullRecord, read_pull, write_pull
from wanforge.exporter.hub.remote import RemoteFile
from wanforge.host.capacity import free_disk_bytes
from wanforge.progress import ByteCount, Progress, silent
from wanforge.whole_file import PARTIAL

LOCK = ".pull.lock"

log = logging.getLogger("wanforge.pull")


@dataclass(frozen=True)
class Item:
    """A file that is wanted, and what is known of it before anything is fetched.

    Attributes:
        path: Where it is, or will be.
        state: It is there; in huggingface_hub's cache; partly fetched; or not here.
        bytes: Its size.
        left_bytes: What is to be written of it.
        expected: The SHA-256 that it must have; empty if nobody knows it.
        commit: The commit that it is from.
        origin: What the hub tells of it, or the file in the cache; None if it is there.
    """

    repository: str
    file: HubFile
    path: Path
    state: Literal["there", "cached", "begun", "absent"]
    bytes: int
    left_bytes: int
    expected: str
    commit: str
    origin: RemoteFile | Path | None = None

    @property
    def partial(self) -> Path:
        """Where the file is until it is complete. Other bytes have another name."""
        tag = self.origin.tag if isinstance(self.origin, RemoteFile) else self.expected or self.commit
        digest = hashlib.sha256(tag.encode()).hexdigest()[:8]
        return self.path.with_name(f".{self.path.name}.{digest}{PARTIAL}")


def folder_of(to: Path, repository: str) -> Path:
    """The folder of a repository below `to`."""
    return to / repository


def survey(to: Path, repositories: Sequence[HubRepository]) -> list[Item]:
    """Find out for every file whether it is there, and how much of it is to be fetched. Nothing is written.

    Raises:
        CheckpointError: The hub does not give a file to this user, or another file has its name.
        ResourceError: The hub cannot be reached, or may not be asked.
    """
    return [item for repository in repositories for item in _survey(folder_of(to, repository.name), repository)]


def _survey(folder: Path, repository: HubRepository) -> Iterator[Item]:
    record = read_pull(folder)
    revision = repository.revision if repository.revision != MAIN or record is None else record.commit
    for file in repository.files:
        path, known = folder / file.path, None
        if record is not None and revision in (MAIN, record.commit):
            known = record.files.get(file.path)
        expected = file.sha256 or (known.sha256 if known else "")
        if path.is_file() and expected:
            size = path.stat().st_size
            yield Item(repository.name, file, path, "there", size, 0, expected, revision)
            continue
        yield _absent(repository.name, file, path, expected, revision)


def _absent(repository: str, file: HubFile, path: Path, expected: str, revision: str) -> Item:
    """A file that is not there, or of which nobody knows whether it is the right one."""
    make = partial(Item, repository, file, path)
    if remote.is_offline():
        if path.exists() or (found := remote.cached(repository, file.path, revision)) is None:
            raise ResourceError(remote.offline(repository, file.path))
        source, commit = found
        size = source.stat().st_size
        return make("cached", size, _copied_bytes(source, path), expected, commit, source)
    origin = remote.look_up(repository, file.path, revision)
    expected = expected or origin.sha256
    if path.exists():
        if not expected:
            raise CheckpointError(f"{path}: is there already, and nothing tells whether it is the hub's; move it away")
        return make("there", path.stat().st_size, 0, expected, origin.commit)
    if (found := remote.cached(repository, file.path, origin.commit)) is not None:
        return make("cached", origin.bytes, _copied_bytes(found[0], path), expected, origin.commit, found[0])
    item = make("absent", origin.bytes, origin.bytes, expected, origin.commit, origin)
    have = item.partial.stat().st_size if item.partial.exists() else 0
    if not 0 < have <= origin.bytes:
        return item
    return make("begun", origin.bytes, origin.bytes - have, expected, origin.commit, origin)


def _copied_bytes(source: Path, path: Path) -> int:
    """The bytes that a copy takes: none on the same disk, where a file can have a second name."""
    place = next(p for p in path.absolute().parents if p.exists())
    return 0 if source.stat().st_dev == place.stat().st_dev else source.stat().st_size


def if_possible(
    take: Callable[[Path, Sequence[HubRepository]], list[Item]], to: Path, repositories: Sequence[HubRepository]
) -> list[Item]:
    """What `survey` or `pull` returns for repositories that can be done without, or nothing if it fails; then the log
    says why."""
    try:
        return take(to, repositories)
    except WanforgeError as error:
        names = join_names([repository.name for repository in repositories])
        log.warning("%s is left out: %s", names, message_of(error))
        return []


def check_disk(to: Path, items: Sequence[Item]) -> None:
    """Refuse to begin if the disk cannot hold what is left to fetch.

    Raises:
        ResourceError: It cannot.
    """
    needed, free = sum(item.left_bytes for item in items), free_disk_bytes(to)
    if needed > free:
        raise ResourceError(
            f"{to}: {needed / 1e9:.2f} GB are to be written, but only {free / 1e9:.2f} GB are free; free some space or "
            "choose another folder with --to"
        )


def pull(to: Path, repositories: Sequence[HubRepository], progress: Progress = silent) -> list[Item]:
    """Fetch every file that is not there yet, and check the hashes of all.

    Where another process is fetching into the same folder, this waits for it. What was fetched before an error or a
    kill is kept, and the next call continues there.

    Args:
        progress: Called with a file's path in its repository, and with ``check`` before it while its hash is computed.

    Returns:
        The files as they were found before.

    Raises:
        CheckpointError: The hub does not give a file to this user, or a file has not the hash that it must have.
        ResourceError: The hub cannot be reached, a connection broke, or the disk is too small.
    """
    check_disk(to, survey(to, repositories))
    found = []
    for repository in repositories:
        folder = folder_of(to, repository.name)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, folder):
            for item in _survey(folder, repository):
                complete(folder, item, progress)
                found.append(item)
    return found


def complete(folder: Path, item: Item, progress: Progress) -> None:
    """Make sure that a file is there and has the hash that it must have."""
    if item.state == "there":
        sha256 = hash_of(item.path, item.file.path, progress)
        if sha256 == item.expected:
            note(folder, item, sha256)
            return
        raise CheckpointError(
            f"{item.path}: has SHA-256 {sha256}, expected {item.expected}; it was changed or damaged: delete it, and "
            "the same command fetches it again"
        )
    item.path.parent.mkdir(parents=True, exist_ok=True)
    for other in item.path.parent.glob(f".{item.path.name}.????????{PARTIAL}"):
        if other != item.partial or item.state != "begun":
            other.unlink()  # of other bytes
    if isinstance(item.origin, RemoteFile):
        remote.fetch(item.origin, item.partial, progress)
    elif item.origin is not None:
        link_or_copy(item.origin, item.partial)
    sha256 = hash_of(item.partial, item.file.path, progress)
    if item.expected not in ("", sha256):
        item.partial.unlink()
        raise CheckpointError(
            f"{item.repository}/{item.file.path}: what was fetched has SHA-256 {sha256}, expected {item.expected}; it "
            "was deleted. Run the same command again; if that does not help, the file on the hub is another one now"
        )
    note(folder, item, sha256)
    item.partial.replace(item.path)


def hash_of(path: Path, name: str, progress: Progress) -> str:
    """The SHA-256 of a file."""
    return sha256_of(path, ByteCount(progress, f"check {name}", path.stat().st_size))


def link_or_copy(source: Path, partial: Path) -> None:
    """Give a file of the cache a second name, or copy it where that is not possible."""
    with suppress(OSError):
        os.link(source.resolve(), partial)
        return
    with naming(partial):
        shutil.copyfile(source, partial)


def note(folder: Path, item: Item, sha256: str) -> None:
    """Record the commit and the hash of a file. This comes before it gets its name, so that no file is without them."""
    record = read_pull(folder)
    if record is None or record.commit != item.commit:
        record = PullRecord(item.repository, item.commit)
    size = (item.path if item.state == "there" else item.partial).stat().st_size
    if (noted := PulledFile(size, sha256)) != record.files.get(item.file.path):
        write_pull(folder, record.adding(item.file.path, noted))
