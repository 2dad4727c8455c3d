"""The server behind proxies with TLS, as their example files set them up, and the unit for systemd."""

import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.integrations.service.programs import answering
from tests.processes import ROOT, free_port
from tests.runtime.service.served import MADE, Rig, running
from tests.runtime.service.web.test_stream import events_of
from wanforge.runtime.service.settings import ServeSettings

pytestmark = pytest.mark.slow

FOLDER = ROOT / "integrations/service"
NGINX = """
pid nginx.pid;
error_log stderr warn;
{user}
events {{}}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    {server}
}}
"""
CADDY = """
{{
    admin off
    auto_https disable_redirects
}}
{site}
"""


@pytest.fixture
def rig(tinywan: Path, tmp_path: Path) -> Iterator[Rig]:
    """A server with keys, as one behind a proxy has to have."""
    (tmp_path / "data").mkdir()
    with running(ServeSettings(), [("", tinywan)], tmp_path / "data", keys=True) as found:
        found.client.headers["Authorization"] = f"Bearer {found.store.add_key('ann')[1]}"
        yield found


@pytest.fixture(params=["nginx", "caddy"])
def client(request: pytest.FixtureRequest, rig: Rig, tmp_path: Path) -> Iterator[httpx2.Client]:
    """A client that reaches the server through a proxy."""
    for program in (request.param, "openssl"):
        if shutil.which(program) is None and not Path("/usr/sbin", program).exists():
            pytest.skip(f"{program} is not installed (Debian's package {program})")
    certificate, key = self_signed(tmp_path)
    port = free_port()
    changes = {
        "videos.example.org": "localhost",
        "127.0.0.1:8000": rig.url.removeprefix("http://"),
        "/etc/ssl/localhost.pem": str(certificate),
        "/etc/ssl/localhost.key": str(key),
    }
    command = {"nginx": nginx, "caddy": caddy}[request.param](tmp_path, port, changes)
    with proxy(command, tmp_path, port, certificate) as found:
        found.headers["Authorization"] = rig.client.headers["Authorization"]
        yield found


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost and its key."""
    certificate, key = folder / "localhost.pem", folder / "localhost.key"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    command = ["openssl", "req", "-x509", *kind, *names, "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def changed(file: str, changes: dict[str, str]) -> str:
    """An example with names, addresses and files that there are here."""
    text = (FOLDER / file).read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def nginx(folder: Path, port: int, changes: dict[str, str]) -> list[str]:
    """The command that starts nginx."""
    server = changed("nginx.conf", changes)
    assert "listen 443 ssl;" in server
    server = server.replace("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;")
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(NGINX.format(user=user, server=server))
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    return [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]


def caddy(folder: Path, port: int, changes: dict[str, str]) -> list[str]:
    """The command that starts Caddy, which would get a certificate from elsewhere."""
    site = changed("Caddyfile", changes)
    assert "localhost {" in site
    tls = f"tls {changes['/etc/ssl/localhost.pem']} {changes['/etc/ssl/localhost.key']}"
    site = site.replace("localhost {", f"https://localhost:{port} {{\n\t{tls}")
    (folder / "Caddyfile").write_text(CADDY.format(site=site))
    return ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


@contextmanager
def proxy(command: list[str], folder: Path, port: int, certificate: Path) -> Iterator[httpx2.Client]:
    """Run a proxy. Yields a client that trusts its certificate."""
    own = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    trusted = ssl.create_default_context(cafile=str(certificate))
    client = httpx2.Client(base_url=f"https://localhost:{port}", verify=trusted, timeout=20)
    with answering(command, client, "/livez", folder, own) as found:
        yield found


def test_a_proxy_passes_everything_on(client: httpx2.Client, rig: Rig) -> None:
    assert "default-src 'none'" in client.get("/").headers["content-security-policy"]
    assert client.get("/v1/videos", headers={"Authorization": "Bearer wrong"}).status_code == 401
    video = client.post("/v1/videos", files={"prompt": (None, "a red circle")}).json()["id"]

    arrivals = []
    with client.stream("GET", f"/v1/videos/{video}/events") as response:
        for event in events_of(response):
            arrivals.append((event["event"], time.monotonic()))
            if event["event"] == "queued":
                time.sleep(0.5)  # an event that is held back would come with the next ones
                job, begun = rig.claim(), time.monotonic()
            elif event["event"] == "started":
                assert time.monotonic() - begun < 5
                rig.complete(job)
    assert [kind for kind, _ in arrivals] == ["queued", "started", "progress", "completed"]

    whole = MADE["video"][0]
    part = client.get(f"/v1/videos/{video}/content", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    assert client.get(f"/v1/videos/{video}/content").content == whole


@pytest.mark.parametrize("megabytes", [20.5, 30])
def test_uploads_that_are_too_large_are_refused_in_the_words_of_the_api(
    client: httpx2.Client, megabytes: float
) -> None:
    big = b"x" * int(megabytes * 1_000_000)
    response = client.post("/v1/videos", files={"prompt": (None, "a"), "input_reference": ("a.png", big)})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    text = (FOLDER / "systemd.service").read_text()
    assert "/opt/wanforge/bin/wanforge " in text
    unit = tmp_path / "wanforge.service"
    unit.write_text(text.replace("/opt/wanforge/bin/wanforge ", "/bin/echo "))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
