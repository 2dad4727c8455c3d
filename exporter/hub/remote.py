"""Asking the Hugging Face Hub for files, and fetching them in pieces.

This uses huggingface_hub, and with it HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HOME and the token of
``hf auth login``. Its own downloads begin again from the start in every process, so a file is fetched here with its
lower functions, over HTTP, which can continue a file at any byte.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from wanforge.errors import CheckpointError, ResourceError, naming
from wanforge.progress import Progress

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SHA256 = re.compile("[0-9a-f]{64}")
"""The hub's tags of large files are their SHA-256; those of small ones are something else."""
SECONDS_BETWEEN = 1.0
"""How long to wait after a connection that broke in the middle of a file."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository on the hub.

    Attributes:
        url: Where its bytes are, at the commit.
        commit: The commit that the revision stands for.
        tag: What changes with its bytes.
    """

    repository: str
    path: str
    url: str
    commit: str
    bytes: int
    tag: str

    @property
    def sha256(self) -> str:
        """Its SHA-256; empty where the hub does not tell."""
        return self.tag if SHA256.fullmatch(self.tag) else ""


def is_offline() -> bool:
    """Whether the user wants nothing to be asked of the hub (HF_HUB_OFFLINE)."""
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def look_up(repository: str, path: str, revision: str) -> RemoteFile:
    """What the hub tells of a file.

    Raises:
        CheckpointError: The hub does not give the file to this user.
        ResourceError: The hub cannot be reached.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url

    with explained(repository, path, revision):
        found = get_hf_file_metadata(hf_hub_url(repository, path, revision=revision), token=get_token())
    if not found.commit_hash or not found.etag or found.size is None:
        raise ResourceError(
            f"{hub()}: does not answer as a Hugging Face Hub does; check HF_ENDPOINT, and whether a proxy changes "
            "answers"
        )
    url = hf_hub_url(repository, path, revision=found.commit_hash)
    return RemoteFile(repository, path, url, found.commit_hash, found.size, found.etag)


def cached(repository: str, path: str, revision: str) -> tuple[Path, str] | None:
    """A file in the cache of huggingface_hub with its commit; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, path, revision=revision)
    if not isinstance(found, str):
        return None
    levels = len(Path(path).parts)
    return Path(found), Path(found).parents[levels - 1].name


def fetch(remote: RemoteFile, partial: Path, progress: Progress) -> None:
    """Fetch what a partial file lacks. A connection that breaks is opened again as long as each one brings something.

    Raises:
        CheckpointError, ResourceError: See `look_up`. What was fetched stays.
        OSError: The file cannot be written.
    """
    import httpx2

    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            with explained(remote.repository, remote.path, remote.commit):
                _append(remote, partial, progress)
            return
        except ResourceError as error:
            if not isinstance(error.__cause__, httpx2.TransportError) or partial.stat().st_size <= before:
                raise
            time.sleep(SECONDS_BETWEEN)


def _append(remote: RemoteFile, partial: Path, progress: Progress) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.file_download import http_get

    token = get_token()
    with naming(partial), CountedFile(partial, remote, progress) as file:
        http_get(
            remote.url,
            file,
            resume_size=file.tell(),
            headers={"authorization": f"Bearer {token}"} if token else {},
            expected_size=remote.bytes,
            tqdm_class=NoBar,
        )
        file.flush()
        os.fsync(file.fileno())


class CountedFile(BufferedWriter):
    """A file that is appended to, and that reports its length as progress."""

    def __init__(self, path: Path, remote: RemoteFile, progress: Progress) -> None:
        super().__init__(FileIO(path, "ab"))
        self.remote, self.progress = remote, progress

    def write(self, data: "ReadableBuffer") -> int:
        written = super().write(data)
        self.progress(self.remote.path, self.tell(), self.remote.bytes, "B")
        return written


class NoBar:
    """A progress bar, as huggingface_hub uses one, that shows nothing."""

    def __init__(self, **options: object) -> None: ...

    def __enter__(self) -> "NoBar":
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, amount: float) -> None: ...


@contextmanager
def explained(repository: str, path: str, revision: str) -> Iterator[None]:
    """Turn errors of huggingface_hub and of the network into those that say what to do."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise ResourceError(offline(repository, path)) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        kind = CheckpointError if status in (401, 403, 404) else ResourceError
        raise kind(refusal(status, repository, path, revision)) from error
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
        raise ResourceError(
            f"{hub()} cannot be reached ({error}); check the network, or set HF_ENDPOINT to a mirror of the hub or "
            "HTTPS_PROXY to a proxy"
        ) from error
    except httpx2.TransportError as error:
        raise ResourceError(
            f"{repository}/{path}: the connection broke ({error or type(error).__name__}); the same command continues "
            "where it stopped"
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise
        said = str(error).partition("\n")[0]
        raise ResourceError(f"{repository}/{path}: {said}; the same command tries again") from error


def refusal(status: int, repository: str, path: str, revision: str) -> str:
    """What a status of the hub means, and what to do."""
    where = f"{hub()}/{repository}"
    if status in (401, 403):
        return (
            f"{where}: the hub does not show this to you (status {status}); log in with `hf auth login` or set "
            "HF_TOKEN to a token that may read it, and accept its terms on that page if it has any"
        )
    if status == 404:
        return f"{where}: the hub has no {path} at revision {revision} (status 404)"
    return (
        f"{where}: the hub answered with status {status} for {path}; the same command, later, continues where it "
        "stopped"
    )


def offline(repository: str, path: str) -> str:
    """The message for a file that is wanted and not here while the hub may not be asked."""
    return (
        f"{repository}/{path} is not here, and HF_HUB_OFFLINE forbids asking for it; unset HF_HUB_OFFLINE, or set "
        "HF_HOME to a cache that has it"
    )


def hub() -> str:
    """The address of the hub."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
