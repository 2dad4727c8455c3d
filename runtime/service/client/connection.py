"""A connection to a server with `/v1/videos`, which outlives the server's restarts."""

import hashlib
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2

from wanforge.errors import RequestError, ResourceError
from wanforge.progress import Progress, silent
from wanforge.version import __version__

log = logging.getLogger(__name__)

TRIES = 8
"""How often a request is sent before the client gives up, over about a minute."""
LONGEST_PAUSE = 15.0
LAST_PORT = 65_535
LONGEST_WISH = 120.0
"""The longest pause that a server may ask for."""
AGAIN = {429, 502, 503, 504}
"""The statuses after which it is worth trying again."""
PIECE = 1 << 18
"""Bytes that are written at a time."""
POLL_SECONDS = 1.0
"""Between two looks at a video whose server has no events."""
IDLE_SECONDS = 60.0
"""How long a server may be silent. It sends a comment to a quiet stream more often than that."""
TIMEOUT = httpx2.Timeout(IDLE_SECONDS, connect=10.0)
VIDEOS, BATCHES = "/v1/videos", "/v1/batches"
TERMINAL = {"completed", "failed", "cancelled", "expired"}

Fields = Mapping[str, Any]
Answer = TypeVar("Answer")


class ServerError(RequestError):
    """The server refuses a request.

    Attributes:
        code: Its stable code.
        status: The HTTP status.
        retry_after: After how many seconds the server wants to be asked again; None if it does not say.
    """

    def __init__(self, message: str, code: str, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.retry_after = code, status, retry_after


class Connection:
    """A server and the key to use it with.

    Args:
        url: Where the server is, such as ``http://127.0.0.1:8000``.
        pause: Waits for some seconds; for tests.

    Raises:
        RequestError: The URL or the key is none.
    """

    def __init__(self, url: str, key: str | None = None, pause: Callable[[float], None] = time.sleep) -> None:
        headers = {"User-Agent": f"wanforge/{__version__}"}
        if key:
            headers["Authorization"] = f"Bearer {checked_key(key)}"
        self.url, self.pause = checked_url(url).rstrip("/"), pause
        self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=TIMEOUT)

    def submit(self, fields: Fields, image: Path | None = None) -> dict[str, Any]:
        """Submit a video. Sending it again after a broken connection makes no second one."""
        data = {name: str(value) for name, value in fields.items() if value is not None}
        files = None if image is None else {"input_reference": (image.name, image.read_bytes())}
        return self._json("POST", VIDEOS, "id", data=data, files=files, headers=idempotent())

    def submit_batch(self, lines: bytes) -> dict[str, Any]:
        """Submit many videos, each a line of JSON or a prompt. Sending them again makes no second batch."""
        headers = {"Content-Type": "application/jsonl", **idempotent()}
        return self._json("POST", BATCHES, "id", content=lines, headers=headers)

    def video(self, video_id: str) -> dict[str, Any]:
        """A video as it is now."""
        return self._json("GET", path_of(VIDEOS, video_id), "status")

    def batch(self, batch_id: str) -> dict[str, Any]:
        """A batch as it is now."""
        return self._json("GET", path_of(BATCHES, batch_id), "status")

    def videos(self, **which: Any) -> Iterator[dict[str, Any]]:
        """Videos, a page after the other."""
        after: str | None = None
        while True:
            more = {} if after is None else {"after": after}
            page = self._json("GET", VIDEOS, "data", params={"limit": 100, **which, **more})
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["last_id"]

    def cancel(self, video_id: str) -> dict[str, Any]:
        """Cancel a video."""
        return self._json("POST", f"{path_of(VIDEOS, video_id)}/cancel", "status")

    def delete(self, video_id: str) -> None:
        """Delete a video with its files."""
        self._json("DELETE", path_of(VIDEOS, video_id), "id")

    def wait(self, video_id: str, progress: Progress = silent) -> dict[str, Any]:
        """Wait until a video has ended, however often the connection breaks.

        Raises:
            ServerError: There is no such video.
        """
        last, tries, has_events = "0", 0, True
        while True:
            try:
                if has_events:
                    for number, data in self._events(video_id, last):
                        last, tries = number, 0
                        progress(data.get("stage") or data.get("kind", ""), int(data.get("progress", 0)), 100)
                found, tries = self._sent("GET", path_of(VIDEOS, video_id), "status"), 0
                if found["status"] in TERMINAL:
                    return found
                self.pause(POLL_SECONDS)
            except (ServerError, httpx2.RequestError) as error:
                if isinstance(error, ServerError) and has_events and error.status in (404, 405):
                    has_events = False  # other servers have none; where the video is missing, asking for it says so
                else:
                    self._outlive(error, tries)
                    tries += 1

    def download(self, video_id: str, path: Path, variant: str = "video", progress: Progress = silent) -> None:
        """Download a result. What an earlier, broken download has left beside `path` is taken up.

        Raises:
            ServerError: There is nothing to download.
        """
        partial = path.with_name(f"{path.name}.{hashlib.sha256(video_id.encode()).hexdigest()[:8]}.download")
        path.parent.mkdir(parents=True, exist_ok=True)
        where = f"{path_of(VIDEOS, video_id)}/content?variant={variant}"
        self._tried(lambda: self._download(where, partial, progress))
        os.replace(partial, path)

    def _download(self, where: str, partial: Path, progress: Progress) -> None:
        begun = partial.stat().st_size if partial.exists() else 0
        headers = {"Range": f"bytes={begun}-"} if begun else {}
        with self.http.stream("GET", where, headers=headers) as response:
            if response.status_code == 416:  # all of it is there already
                return
            if response.status_code >= 400:
                response.read()
                raise refusal(response)
            is_rest = response.status_code == 206
            total = (begun if is_rest else 0) + int(response.headers.get("content-length", 0))
            with partial.open("ab" if is_rest else "wb") as file:
                for piece in response.iter_bytes(PIECE):
                    file.write(piece)
                    progress("download", file.tell(), total, "B")

    def _events(self, video_id: str, last: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of a video after one, with their numbers."""
        headers = {"Last-Event-ID": last}
        with self.http.stream("GET", f"{path_of(VIDEOS, video_id)}/events", headers=headers) as response:
            if response.status_code >= 400:
                response.read()
                raise refusal(response)
            number = last
            for line in response.iter_lines():
                if line.startswith("id: "):
                    number = line[4:]
                elif line.startswith("data: "):
                    try:
                        data = json.loads(line[6:])
                    except ValueError:  # the connection broke within a line
                        return
                    if isinstance(data, dict):
                        yield number, data

    def _json(self, method: str, path: str, key: str, **options: Any) -> dict[str, Any]:
        """Send a request until there is an answer to it, which has to be an object with a key.

        Raises:
            ServerError: The server refuses it.
            ResourceError: The server cannot be reached.
        """
        return self._tried(lambda: self._sent(method, path, key, **options))

    def _sent(self, method: str, path: str, key: str, **options: Any) -> dict[str, Any]:
        """The answer to a request that is sent once."""
        response = self.http.request(method, path, **options)
        if response.status_code >= 400:
            raise refusal(response)
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict) or key not in found:
            raise RequestError(
                f"{self.url}{path}: the answer is no JSON object with {key!r}, but {response.text[:100]!r}; check that "
                "--url leads to a server with the API /v1/videos"
            )
        return found

    def _tried(self, send: Callable[[], Answer]) -> Answer:
        """Send something until there is an answer to it."""
        for attempt in range(TRIES):
            try:
                return send()
            except (ServerError, httpx2.RequestError) as error:
                self._outlive(error, attempt)
        raise AssertionError("the last failure is raised")

    def _outlive(self, error: ServerError | httpx2.RequestError, attempt: int) -> None:
        """Wait after a failed try, if another one is worth it.

        Raises:
            ServerError: The server refuses the request, or is still not there.
            ResourceError: The server cannot be reached.
        """
        is_last = attempt + 1 >= TRIES
        if isinstance(error, ServerError):
            if is_last or error.status not in AGAIN:
                raise error
        elif is_last or isinstance(error, httpx2.UnsupportedProtocol):
            raise unreachable(self.url) from None
        if attempt == 0:
            log.warning("%s cannot serve this now (%s). Trying again for about a minute.", self.url, error)
        wish = error.retry_after if isinstance(error, ServerError) else None
        self.pause(pause_of(attempt) if wish is None else wish)

    def close(self) -> None:
        self.http.close()


@contextmanager
def connected(url: str, key: str | None) -> Iterator[Connection]:
    """A connection that is closed with the block."""
    connection = Connection(url, key)
    try:
        yield connection
    finally:
        connection.close()


def path_of(route: str, name: str) -> str:
    """The path of a video or a batch, whatever characters its id has."""
    return f"{route}/{quote(name, safe='')}"


def idempotent() -> dict[str, str]:
    """The header by which a server knows a request that is sent again."""
    return {"Idempotency-Key": secrets.token_hex(16)}


def pause_of(attempt: int) -> float:
    """Seconds to wait after an attempt."""
    return min(LONGEST_PAUSE, 0.5 * 2.0**attempt)


def checked_url(url: str) -> str:
    """The URL of a server.

    Raises:
        RequestError: It is none.
    """
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise RequestError(f"--url {url!r} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.host or (parts.port or 0) > LAST_PORT:
        raise RequestError(f"--url {url!r} is no URL of a server; write it like http://127.0.0.1:8000")
    return url


def checked_key(key: str) -> str:
    """An API key.

    Raises:
        RequestError: It has characters that no key has.
    """
    if not key.isascii() or not key.isprintable():
        raise RequestError("the API key has characters that no key has; copy it again from wanforge serve keys add")
    return key


def wished_pause(response: httpx2.Response) -> float | None:
    """The seconds after which a server wants to be asked again, up to `LONGEST_WISH`."""
    text = response.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_WISH) if math.isfinite(seconds) else None


def refusal(response: httpx2.Response) -> ServerError:
    """The error that an answer amounts to."""
    status, pause = response.status_code, wished_pause(response)
    try:
        error = response.json()["error"]
        where = f"{error['param']}: " if error.get("param") else ""
        return ServerError(f"the server refuses: {where}{error['message']}", error["code"], status, pause)
    except (ValueError, KeyError, TypeError, AttributeError):
        said = response.text[:200].strip() or response.reason_phrase
        return ServerError(f"the server answers {status}: {said}", "unknown", status, pause)


def unreachable(url: str) -> ResourceError:
    return ResourceError(f"{url}: cannot be reached; check that the server runs: wanforge serve BUNDLE")
