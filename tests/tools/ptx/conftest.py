"""Kernels that are compiled once for all tests of a run, and read once for those of a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import shared_folder
from tools.ptx.syntax import forget_kernels
from wanforge.configs.tiles import Tile
from wanforge.plugins.launching import call
from wanforge.version import PACKAGE

PLANTED = Path(__file__).parent / "planted"


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """Let go of kernels after each file."""
    yield
    forget_kernels()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of cubins and their PTX, to which every process of this run adds what it compiles."""
    return shared_folder(tmp_path_factory) / "ptx"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler find the kernels here among those of the package, and give them a tile."""
    plugins = tmp_path / "wanforge" / "plugins"
    plugins.mkdir(parents=True)
    for there, own in ((PACKAGE, plugins.parent), (PACKAGE / "plugins", plugins)):
        for each in there.iterdir():
            if each.name not in ("plugins", "__pycache__"):
                (own / each.name).symlink_to(each.resolve())
    (plugins / "planted").symlink_to(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(call, "tile_for", lambda name, sm: Tile([sm], 4, 3, "a test"))
