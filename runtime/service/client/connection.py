"""A connection to a server with `/v1/videos`, which outlives the server's restarts."""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from wanforge.errors import RequestError, ResourceError
from wanforge.progress import Progress, silent
from wanforge.version import __version__

TRIES = 8
"""How often a request is sent before the client gives up, over about a minute."""
LONGEST_PAUSE = 15.0
AGAIN = {429, 502, 503, 504}
"""The statuses after which it is worth trying again."""
PIECE = 1 << 18
"""Bytes that are written at a time."""
POLL_SECONDS = 1.0
"""Between two looks at a video whose server has no events."""
IDLE_SECONDS = 60.0
"""How long a server may be silent. It sends a comment to a quiet stream more often than that."""
TERMINAL = {"completed", "failed", "cancelled", "expired"}

Fields = Mapping[str, Any]


class ServerError(RequestError):
    """The server refuses a request.

    Attributes:
        code: Its stable code.
        status: The HTTP status.
    """

    def __init__(self, message: str, code: str, status: int) -> None:
        super().__init__(message)
        self.code, self.status = code, status


class Connection:
    """A server and the key to use it with.

    Args:
        url: Where the server is, such as ``http://127.0.0.1:8000``.
        pause: Waits for some seconds; for tests.
    """

    def __init__(self, url: str, key: str | None = None, pause: Callable[[float], None] = time.sleep) -> None:
        headers = {"User-Agent": f"wanforge/{__version__}"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self.url, self.pause = url.rstrip("/"), pause
        self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=IDLE_SECONDS)

    def submit(self, fields: Fields, image: Path | None = None) -> dict[str, Any]:
        """Submit a video. Sending it again after a broken connection makes no second one."""
        data = {name: str(value) for name, value in fields.items() if value is not None}
        files = None if image is None else {"input_reference": (image.name, image.read_bytes())}
        return self._json("POST", "/v1/videos", data=data, files=files, headers=idempotent())

    def submit_batch(self, lines: bytes) -> dict[str, Any]:
        """Submit many videos, each a line of JSON or a prompt."""
        headers = {"Content-Type": "application/jsonl"}
        return self._json("POST", "/v1/batches", content=lines, headers=headers)

    def video(self, video_id: str) -> dict[str, Any]:
        """A video as it is now."""
        return self._json("GET", f"/v1/videos/{video_id}")

    def batch(self, batch_id: str) -> dict[str, Any]:
        """A batch as it is now."""
        return self._json("GET", f"/v1/batches/{batch_id}")

    def videos(self, **which: Any) -> Iterator[dict[str, Any]]:
        """Videos, a page after the other."""
        after: str | None = None
        while True:
            more = {} if after is None else {"after": after}
            page = self._json("GET", "/v1/videos", params={"limit": 100, **which, **more})
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["last_id"]

    def cancel(self, video_id: str) -> dict[str, Any]:
        """Cancel a video."""
        return self._json("POST", f"/v1/videos/{video_id}/cancel")

    def delete(self, video_id: str) -> None:
        """Delete a video with its files."""
        self._json("DELETE", f"/v1/videos/{video_id}")

    def wait(self, video_id: str, progress: Progress = silent) -> dict[str, Any]:
        """Wait until a video has ended, however often the connection breaks.

        Raises:
            ServerError: There is no such video.
        """
        last, tries, has_events = "0", 0, True
        while tries < TRIES:
            try:
                if has_events:
                    for number, data in self._events(video_id, last):
                        last, tries = number, 0
                        progress(data.get("stage") or data["kind"], int(data.get("progress", 0)), 100)
                found = self.video(video_id)
                if found["status"] in TERMINAL:
                    return found
                self.pause(POLL_SECONDS)
            except ServerError as error:
                if not has_events or error.status not in (404, 405):
                    raise
                has_events = False  # other servers have none; where the video is missing, asking for it says so
            except httpx2.TransportError:
                self.pause(pause_of(tries))
                tries += 1
        raise unreachable(self.url)

    def download(self, video_id: str, path: Path, variant: str = "video", progress: Progress = silent) -> None:
        """Download a result. What an earlier, broken download has left beside `path` is taken up.

        Raises:
            ServerError: There is nothing to download.
        """
        partial = path.with_name(f"{path.name}.{hashlib.sha256(video_id.encode()).hexdigest()[:8]}.download")
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(TRIES):
            try:
                self._download(f"/v1/videos/{video_id}/content?variant={variant}", partial, progress)
                os.replace(partial, path)
                return
            except httpx2.TransportError:
                self.pause(pause_of(attempt))
        raise unreachable(self.url)

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
        with self.http.stream("GET", f"/v1/videos/{video_id}/events", headers=headers) as response:
            if response.status_code >= 400:
                response.read()
                raise refusal(response)
            number = last
            for line in response.iter_lines():
                if line.startswith("id: "):
                    number = line[4:]
                elif line.startswith("data: "):
                    yield number, json.loads(line[6:])

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Send a request until there is an answer to it.

        Raises:
            ServerError: The server refuses it.
            ResourceError: The server cannot be reached.
        """
        for attempt in range(TRIES):
            try:
                response = self.http.request(method, path, **options)
            except httpx2.TransportError:
                self.pause(pause_of(attempt))
                continue
            if response.status_code < 400:
                found: dict[str, Any] = response.json()
                return found
            if response.status_code not in AGAIN or attempt == TRIES - 1:
                raise refusal(response)
            self.pause(float(response.headers.get("retry-after", pause_of(attempt))))
        raise unreachable(self.url)

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


def idempotent() -> dict[str, str]:
    """The header by which a server knows a request that is sent again."""
    return {"Idempotency-Key": secrets.token_hex(16)}


def pause_of(attempt: int) -> float:
    """Seconds to wait after an attempt."""
    return min(LONGEST_PAUSE, 0.5 * 2.0**attempt)


def refusal(response: httpx2.Response) -> ServerError:
    """The error that an answer amounts to."""
    try:
        error = response.json()["error"]
        where = f"{error['param']}: " if error.get("param") else ""
        return ServerError(f"the server refuses: {where}{error['message']}", error["code"], response.status_code)
    except (ValueError, KeyError, TypeError):
        said = response.text[:200].strip() or response.reason_phrase
        return ServerError(f"the server answers {response.status_code}: {said}", "unknown", response.status_code)


def unreachable(url: str) -> ResourceError:
    return ResourceError(f"{url}: cannot be reached; check that the server runs: wanforge serve BUNDLE")
