"""Clients that mean harm: they are refused, and others are served meanwhile."""

import gzip
import io
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.runtime.service.served import Rig, running
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.service.settings import ServeSettings
from wanforge.runtime.service.web import page
from wanforge.runtime.service.web.guard import bodies, connections
from wanforge.runtime.service.web.intake import submitting

PROMPT = {"prompt": "a red circle"}
POST = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextmanager
def connected(rig: Rig) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(rig.url.rpartition(":")[2])), timeout=10) as client:
        yield client


def dribbled(client: socket.socket, rest: bytes, pause: float = 0.05) -> tuple[float, bytes]:
    """Send a byte at a time until the server has had enough. Returns after how many seconds, and what it said."""
    begun, said = time.monotonic(), b""
    client.settimeout(pause)
    try:
        for place in range(len(rest)):
            client.sendall(rest[place : place + 1])
            try:
                more = client.recv(65536)
            except TimeoutError:
                continue
            if not more:
                break
            said += more
    except ConnectionError:
        pass
    return time.monotonic() - begun, said


@pytest.mark.slow
def test_a_client_that_sends_its_headers_slowly_is_cut_off(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with connected(rig) as slow:
        seconds, said = dribbled(slow, POST + b"X-Long: " + b"a" * 1000)
    assert 0.4 < seconds < 3
    assert said == b""
    assert rig.submit()["status"] == "queued"


@pytest.mark.slow
def test_a_connection_may_be_idle_between_requests_but_not_within_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    asked = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(rig) as client:
        for _ in range(2):
            client.sendall(asked)
            said = b""
            while not said.endswith(b"alive\n"):  # the head may come before the body
                said += client.recv(65536)
            assert said.startswith(b"HTTP/1.1 200")
            time.sleep(0.6)
        client.sendall(asked[:20])
        begun = time.monotonic()
        with suppress(ConnectionError):
            assert client.recv(65536) == b""
        assert 0.2 < time.monotonic() - begun < 2


@pytest.mark.slow
def test_a_client_that_sends_its_body_slowly_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE", 0.5)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    with connected(rig) as slow:
        slow.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        seconds, said = dribbled(slow, b"a" * 1000)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b'"too_slow"' in said
    assert 0.9 < seconds < 4  # the answer, and then what is left of the body
    assert rig.submit()["status"] == "queued"


@pytest.mark.slow
def test_slow_clients_do_not_hold_others_up(rig: Rig) -> None:
    slow = [socket.create_connection(("127.0.0.1", int(rig.url.rpartition(":")[2]))) for _ in range(200)]
    try:
        for number, client in enumerate(slow):
            client.sendall(POST + (b"Content-Length: 1000\r\n\r\n{" if number % 2 else b"X-Long: "))
        begun = time.monotonic()
        assert rig.submit()["status"] == "queued"
        assert time.monotonic() - begun < 2
    finally:
        for client in slow:
            client.close()


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut_off(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.5)
    path = f"/v1/videos/{rig.submit()['id']}/content"
    job = rig.make()
    found = rig.store.get(job.id)
    assert found is not None
    assert found.result is not None
    size = 40_000_000
    os.truncate(rig.service.objects.local(found.result.objects["video"]), size)
    with connected(rig) as slow:
        slow.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        time.sleep(1.5)
        came = 0
        try:
            while more := slow.recv(1 << 20):
                came += len(more)
        except ConnectionError:
            pass
    assert came < size
    assert len(rig.client.get(path).content) == size


def test_headers_are_bounded(rig: Rig) -> None:
    for headers in (b"X: " + b"a" * 200_000 + b"\r\n", b"X: a\r\n" * 50_000):
        with connected(rig) as client:
            seconds, said = time.monotonic(), b""
            try:
                client.sendall(POST + headers + b"Content-Length: 0\r\n\r\n")
                said = client.recv(65536)
            except ConnectionError:
                pass
            assert said[:12] in (b"", b"HTTP/1.1 400")
            assert time.monotonic() - seconds < 5
    assert rig.client.get("/livez").status_code == 200


def test_a_head_without_an_end_is_cut_off(rig: Rig) -> None:
    sent = 0
    with connected(rig) as client, suppress(ConnectionError):
        client.sendall(POST + b"X: ")
        while sent < 50_000_000:
            client.sendall(b"a" * 10_000)
            sent += 10_000
    assert sent < 20_000_000  # what fits into the buffers of both sockets, and not the server's memory
    assert rig.client.get("/livez").status_code == 200


def test_a_head_in_two_pieces_is_no_longer_for_the_body_behind_it(rig: Rig) -> None:
    body = b'{"prompt": "a red circle", "input_reference": "' + b"A" * 150_000 + b'"}'
    head = POST + b"Content-Length: %d\r\n\r\n" % len(body)
    with connected(rig) as client:
        client.sendall(head[:50])
        time.sleep(0.1)
        client.sendall(head[50:] + body)
        said = client.recv(65536)
    assert b'"input_reference"' in said  # which is refused by what it says, and not by its length


@pytest.mark.parametrize("piece", [b"x-a: " + b"b" * 6000 + b"\r\n", b"b" * 6000])
def test_what_follows_a_body_is_bounded(rig: Rig, piece: bytes) -> None:
    sent = 0
    with connected(rig) as client, suppress(ConnectionError):
        client.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nx: ")
        while sent < 50_000_000:
            client.sendall(piece)
            sent += len(piece)
    assert sent < 20_000_000
    assert rig.client.get("/livez").status_code == 200


def part(name: bytes, head: bytes, data: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="' + name + b'"' + head + b"\r\n\r\n" + data + b"\r\n"


@pytest.mark.parametrize(
    "body",
    [
        part(b"prompt", b"", b"a red circle") * 2,
        b"".join(part(b"f%d" % number, b"", b"") for number in range(100)),
        b"".join(part(b"f%d" % number, b'; filename="f"', b"") for number in range(3)),
        part(b"prompt", b"\r\nX: " + b"a" * 1_000_000, b"a red circle"),
        part(b"prompt", b"\r\nX: a" * 10_000, b"a red circle"),
        part(b"p" * 100_000, b"", b"a"),
        part(b"prompt", b"", b"a" * 30_000),
        b"--x\r\n" * 10_000,
        b"no form",
    ],
)
def test_forms_are_bounded(rig: Rig, body: bytes) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = rig.client.post("/v1/videos", content=body + b"--x--\r\n", headers=kind)
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 1000


def test_compressed_bodies_are_not_unpacked(rig: Rig) -> None:
    packed = gzip.compress(b'{"prompt": "a red circle"}')
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert rig.client.post("/v1/videos", content=packed, headers=headers).status_code == 400


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PPM", "TGA"])
def test_only_usual_formats_of_pictures_are_opened(rig: Rig, kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, kind)
    answer = rig.client.post("/v1/videos", data=PROMPT, files={"input_reference": ("x.png", file.getvalue())})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")
    assert "not a picture in PNG" in answer.json()["error"]["message"]


@pytest.mark.slow
def test_pictures_are_drawn_few_at_once(
    bundle_of: Callable[[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing, most, go = 0, 0, threading.Event()

    def slowly(picture: bytes, limits: Any) -> bytes:
        nonlocal drawing, most
        drawing += 1
        most = max(most, drawing)
        go.wait(10)
        drawing -= 1
        return picture

    monkeypatch.setattr(submitting, "redrawn", slowly)
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "PNG")
    with running(ServeSettings(), [("", bundle_of("tiny-i2v", "w8a8").root)], tmp_path) as rig:

        def send() -> None:
            httpx2.post(f"{rig.url}/v1/videos", data=PROMPT, files={"input_reference": ("x", file.getvalue())})

        clients = [threading.Thread(target=send) for _ in range(45)]
        for client in clients:
            client.start()
        time.sleep(1.0)
        assert rig.client.get("/v1/videos").status_code == 200
        go.set()
        for client in clients:
            client.join()
    assert most == 2


@pytest.mark.parametrize(
    "path",
    [
        "/v1/videos/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/videos/..%2fjobs.sqlite/content",
        "/v1/videos/x/content/../../../page.js",
        "/v1/models/..%2f..%2fmanifest.json",
        "/v1/batches/%2fetc%2fpasswd",
        "/../settings.py",
        "/%2e%2e/settings.py",
        "/page.html",
        "/__init__.py",
        "//etc/passwd",
    ],
)
def test_no_path_leads_to_another_file(rig: Rig, path: str) -> None:
    with connected(rig) as client:  # other clients shorten paths
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        said = b""
        while more := client.recv(65536):
            said += more
    assert said.startswith(b"HTTP/1.1 404 ")
    assert b'"code":"not_found"' in said


@pytest.mark.parametrize(
    "path", ["/v1/videos/%00", "/v1/batches/%00/cancel", "/v1/videos?after=%00", "/v1/videos?batch=a%00"]
)
def test_ids_that_are_no_text_are_refused(rig: Rig, path: str) -> None:
    answer = rig.client.request("POST" if "cancel" in path else "GET", path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


def test_no_variant_is_an_object_of_another_name(rig: Rig) -> None:
    path = f"/v1/videos/{rig.submit()['id']}/content"
    rig.make()
    assert rig.client.get(path, params={"variant": "../../jobs.sqlite"}).status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:1"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:8000"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Host": ""},
        {"Host": "[::1"},
    ],
)
def test_other_sites_can_do_nothing_without_a_key(rig: Rig, headers: dict[str, str]) -> None:
    answers = [
        rig.client.post("/v1/videos", data=PROMPT, headers=headers),
        rig.client.get("/v1/videos", headers=headers),
    ]
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(403, "not_allowed")] * 2
    assert rig.client.get("/v1/videos").json()["data"] == []


def test_the_page_of_the_server_itself_is_served(rig: Rig, tinywan: Path, tmp_path: Path) -> None:
    port = rig.url.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "localhost"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert rig.client.post("/v1/videos", data=PROMPT, headers=headers).status_code == 200
    (tmp_path / "locked").mkdir()
    with running(ServeSettings(), [("", tinywan)], tmp_path / "locked", keys=True) as locked:
        _, key = locked.store.add_key("ann")
        headers = {"Host": "videos.example", "Origin": "https://other.example", "Authorization": f"Bearer {key}"}
        assert locked.client.post("/v1/videos", data=PROMPT, headers=headers).status_code == 200


def test_prompts_run_nothing_on_the_page(rig: Rig) -> None:
    sources = [path for path in page.FOLDER.iterdir() if path.suffix in (".html", ".js")]
    assert sources
    for path in sources:
        unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|<script>|\son\w+="
        assert not re.findall(unsafe, path.read_text()), path.name
    policy = rig.client.get("/").headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    prompt = "<script>alert(1)</script>"
    listed = [rig.client.get(f"/v1/videos/{rig.submit(prompt=prompt)['id']}"), rig.client.get("/v1/videos")]
    for answer in listed:
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert prompt not in rig.client.get("/metrics").text
