"""Fetching from a server for tests, whose address is told to be a public one."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpcore2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from wanforge.errors import RequestError
from wanforge.runtime.service.fetching import fetcher
from wanforge.runtime.service.fetching.fetcher import Fetcher

HOST, PUBLIC = "pictures.example", "93.184.216.34"
URL = f"https://{HOST}/x.png"
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for `HOST` with its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "certificate.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


@dataclass
class Detour(httpcore2.AsyncNetworkBackend):
    """A network in which every address is that of the server for tests.

    Attributes:
        asked: The addresses that were connected to.
    """

    port: int
    asked: list[tuple[str, int]] = field(default_factory=list)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        self.asked.append((host, port))
        return await httpcore2.AnyIOBackend().connect_tcp("127.0.0.1", self.port, timeout)


@dataclass
class Tried:
    """What came of a try to fetch something."""

    result: bytes | str
    asked: list[tuple[str, int]]
    names: list[str]


def tried(certificate: Path, answer: Answer, url: str = URL, *addresses: str, **more: Any) -> Tried:
    """Fetch a URL. The n-th time that its host is resolved, it has the n-th address."""
    names = list[str]()

    async def resolve(host: str) -> list[str]:
        names.append(host)
        return [(addresses or (PUBLIC,))[len(names) - 1]]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(writer)
            writer.close()
        except (OSError, asyncio.IncompleteReadError):
            pass

    async def fetch() -> Tried:
        inward = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        inward.load_cert_chain(certificate)
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=inward)
        network = Detour(server.sockets[0].getsockname()[1])
        context = ssl.create_default_context(cafile=str(certificate))
        given = {"hosts": (HOST,), "most_bytes": 1000, "resolve": resolve, "network": network, "context": context}
        try:
            result: bytes | str = await Fetcher(**{**given, **more}).fetch(url)
        except RequestError as error:
            result = str(error)
        server.close()
        return Tried(result, network.asked, names)

    return asyncio.run(fetch())


def saying(text: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        await writer.drain()

    return answer


def ok(body: bytes, more: bytes = b"") -> Answer:
    return saying(b"HTTP/1.1 200 OK\r\n" + more + b"Content-Length: %d\r\n\r\n" % len(body) + body)


def test_a_file_is_fetched_from_the_address_that_was_checked(certificate: Path) -> None:
    found = tried(certificate, ok(b"picture"), URL, PUBLIC, "127.0.0.1")
    assert found == Tried(b"picture", [(PUBLIC, 443)], [HOST])


def test_a_host_with_any_other_address_is_not_visited(certificate: Path) -> None:
    for address in ("127.0.0.1", "169.254.169.254", "::ffff:8.8.8.8", "10.0.0.1"):
        found = tried(certificate, ok(b"picture"), URL, address)
        assert (found.result, found.asked) == ("the host of the URL has no public address that answers", [])

    async def both(host: str) -> list[str]:
        return [PUBLIC, "127.0.0.1"]

    assert tried(certificate, ok(b"picture"), resolve=both).asked == []


@pytest.mark.parametrize(
    "url",
    [
        f"http://{HOST}/x.png",
        f"ftp://{HOST}/x.png",
        "file:///etc/passwd",
        f"https://{HOST}:8443/x.png",
        f"https://{HOST}:80/x.png",
        f"https://ann:secret@{HOST}/x.png",
        f"https://{HOST}@evil.example/x.png",
        f"https://evil.example#@{HOST}/",
        f"https://evil.example\\@{HOST}/",
        f"https://{HOST}.evil.example/",
        f"https://{HOST}./x.png",
        "https://evil.example/",
        "https:///x.png",
        "https://[::1/",
    ],
)
def test_urls_of_other_kinds_are_refused_before_anything_is_asked(certificate: Path, url: str) -> None:
    found = tried(certificate, ok(b"picture"), url)
    assert isinstance(found.result, str)
    assert (found.asked, found.names) == ([], [])


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"),
        *(
            "localhost",
            "metadata",
            "a..example",
            "-a.example",
            "8.8.8.8",
            "1.1.1.1.",
            "\uff11\uff12\uff17.0.0.1",
            "\u24dbocalhost",
        ),
    ],
)
def test_addresses_are_no_names_of_hosts_even_if_every_host_is_allowed(certificate: Path, host: str) -> None:
    found = tried(certificate, ok(b"picture"), f"https://{host}/", hosts=("*",))
    assert isinstance(found.result, str)
    assert (found.asked, found.names) == ([], [])


def test_hosts_are_allowed_by_patterns(certificate: Path) -> None:
    for pattern in ("*", "*.example", HOST):
        assert tried(certificate, ok(b"picture"), URL.upper().replace("HTTPS", "https"), hosts=(pattern,)).result == (
            b"picture"
        )
    assert tried(certificate, ok(b"picture"), hosts=("*.pictures.example",)).result != b"picture"


def test_redirects_are_not_followed(certificate: Path) -> None:
    moved = saying(b"HTTP/1.1 302 Found\r\nLocation: https://169.254.169.254/\r\nContent-Length: 0\r\n\r\n")
    found = tried(certificate, moved)
    assert found.result == "the URL was answered with 302; redirects are not followed"
    assert len(found.asked) == 1


def test_a_file_has_a_largest_size_whatever_its_server_says(certificate: Path) -> None:
    chunked = saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"64\r\n" + b"a" * 100 + b"\r\n")

    async def endless(writer: asyncio.StreamWriter) -> None:
        await chunked(writer)
        while True:
            writer.write(b"64\r\n" + b"a" * 100 + b"\r\n")
            await writer.drain()

    for answer in (ok(b"a" * 1001), endless):
        assert tried(certificate, answer).result == "the file has more than 1,000 bytes"
    assert tried(certificate, ok(b"a" * 1000)).result == b"a" * 1000


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"])
def test_a_slow_server_is_not_waited_for(certificate: Path, monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(fetcher, "SECONDS", 0.3)

    async def dribbling(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.02)

    assert tried(certificate, dribbling).result == "the URL was not fetched within 0.3 s"


def test_the_certificate_is_that_of_the_name(certificate: Path) -> None:
    found = tried(certificate, ok(b"picture"), "https://other.example/", hosts=("*",))
    assert found.result == "the host of the URL has no public address that answers"
    assert tried(certificate, ok(b"picture"), context=ssl.create_default_context()).result == found.result


@pytest.mark.parametrize("text", [b"", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\na"])
def test_a_broken_answer_is_said(certificate: Path, text: bytes) -> None:
    assert tried(certificate, saying(text)).result == "the host of the URL has no public address that answers"
