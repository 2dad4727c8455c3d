"""A bundle of TinyWan for batches, some prompts, and their clips."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import succeeded
from tests.conftest import made_once
from tests.s3 import s3_server, with_bucket
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
    with s3_server() as url:
        for name, value in with_bucket(url, "batches").items():
            monkeypatch.setenv(name, value)
        yield "s3://batches/tonight"


def clips(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}
