"""A stand-in for the Hugging Face Hub and the servers that its large files are on, as huggingface_hub talks to them.

Source: huggingface_hub 2.4.0, file_download.py and utils/_http.py: a file is at /OWNER/NAME/resolve/REVISION/PATH. The
hub answers a HEAD of a large file with a redirect to another server, and tells commit, size and SHA-256 in headers.
"""

import hashlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000
"""The least bytes of a file that the hub keeps on another server."""
RESOLVE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Hub:
    """What the hub has, how it fails, and what it was asked.

    Attributes:
        files: Bytes by repository and path.
        token: What it wants to see before it shows anything; nothing if it is empty.
        status: A status with which it answers everything; 0 for none.
        cuts: After how many bytes the connections of the next answers with large files are reset.
        stall: Whether an answer that would be cut stops there and keeps the connection instead.
        ignores_ranges: Whether whole files come where a part was asked for.
        asked: Method, path, and the headers Range and Authorization of each request.
    """

    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    token: str = ""
    status: int = 0
    cuts: list[int] = field(default_factory=list)
    stall: bool = False
    ignores_ranges: bool = False
    commit: str = COMMIT
    endpoint: str = ""
    store: str = ""
    asked: list[tuple[str, str, str, str]] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def gets(self) -> list[tuple[str, str]]:
        """The paths that bytes were asked of, and the ranges."""
        return [(path, ranges) for method, path, ranges, _ in self.asked if method == "GET" and "/blobs/" in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(None)

    def answer(self, body: bytes | None) -> None:
        authorization = self.headers.get("Authorization", "")
        self.hub.asked.append((self.command, self.path, self.headers.get("Range", ""), authorization))
        if self.path.startswith("/blobs/"):
            self.send_blob(self.path.removeprefix("/blobs/"))
            return
        if self.hub.status:
            self.refuse(self.hub.status, "")
            return
        asked = RESOLVE.fullmatch(self.path)
        assert asked is not None, self.path
        known = {repository for repository, _ in self.hub.files}
        if self.hub.token and authorization != f"Bearer {self.hub.token}":
            self.refuse(401, "GatedRepo")
        elif asked["repository"] not in known:
            self.refuse(404 if authorization else 401, "RepoNotFound")
        elif asked["revision"] not in ("main", self.hub.commit):
            self.refuse(404, "RevisionNotFound")
        elif (content := self.hub.files.get((asked["repository"], asked["path"]))) is None:
            self.refuse(404, "EntryNotFound")
        else:
            self.resolve(content)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def resolve(self, content: bytes) -> None:
        digest, is_large = hashlib.sha256(content).hexdigest(), len(content) >= LARGE
        self.send_response(302 if is_large else 200)
        self.send_header("X-Repo-Commit", self.hub.commit)
        if is_large:
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("Location", f"{self.hub.store}/blobs/{digest}")
            self.send_header("Content-Length", "0")
        else:
            self.send_header("ETag", f'"{digest[:40]}"')
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not is_large and self.command == "GET":
            self.wfile.write(content)

    def send_blob(self, digest: str) -> None:
        content = next(c for c in self.hub.files.values() if hashlib.sha256(c).hexdigest() == digest)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and not self.hub.ignores_ranges else 0
        if start and start >= len(content):
            self.refuse(416, "")
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not self.hub.cuts:
            self.wfile.write(content[start:])
            return
        self.wfile.write(content[start : start + self.hub.cuts.pop(0)])
        self.wfile.flush()
        if self.hub.stall:
            self.hub.is_over.wait()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset at close
        self.close_connection = True
        self.connection.close()


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None: ...


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on two ports, of which one is that of the large files."""
    handler = type("HandlerOfHub", (Handler,), {"hub": hub})
    servers = [Server(("127.0.0.1", 0), handler) for _ in range(2)]
    names = "127.0.0.1", "localhost"  # as different as the names of the hub and of its stores
    hub.endpoint, hub.store = (
        f"http://{name}:{each.server_address[1]}" for name, each in zip(names, servers, strict=True)
    )
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.is_over.set()
        for server in servers:
            server.shutdown()
            server.server_close()
