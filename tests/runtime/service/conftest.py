"""Servers of TinyWan, which comes with the package."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import made_once
from tests.runtime.service.served import Rig, running
from wanforge.api import import_checkpoint
from wanforge.runtime.service.settings import ServeSettings


@pytest.fixture(scope="session")
def tinywan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of TinyWan."""
    return made_once(tmp_path_factory, "served-tinywan", lambda folder: import_checkpoint(folder, recipe="w8a8"))


@pytest.fixture
def rig(tinywan: Path, tmp_path: Path) -> Iterator[Rig]:
    """A server without keys."""
    with running(ServeSettings(), [("", tinywan)], tmp_path) as found:
        yield found
