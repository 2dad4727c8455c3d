"""A bundle of TinyWan for batches, some prompts, and their clips."""

import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.command_line import succeeded
from tests.conftest import made_once
from wanforge.api import import_checkpoint

PROMPTS = ["A red circle moves to the right.", "A small blue triangle stays still.", "A green ring.", "A yellow star."]
SMALL = ("--frames", 5, "--steps", 2)


@pytest.fixture(scope="session")
def tinywan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of TinyWan."""
    return made_once(tmp_path_factory, "served-tinywan", lambda folder: import_checkpoint(folder, recipe="w8a8"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture(scope="session")
def undisturbed(tinywan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run, with its prompts and its clips."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    succeeded("batch", folder / "prompts.txt", "--bundle", tinywan, "--out", folder / "clips", *SMALL)
    return folder


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server that speaks S3's protocol."""
    missing = [name for name in ("obstore", "moto", "flask", "flask_cors") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed (the extra dev)")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/batches", method="PUT")).close()
    for name, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
    ):
        monkeypatch.setenv(name, value)
    yield "s3://batches/tonight"
    server.stop()


def clips(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}
