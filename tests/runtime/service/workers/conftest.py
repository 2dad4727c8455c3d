"""Folders in which supervisors work."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import made_once
from tests.runtime.service.workers.rig import Rig
from wanforge.api import import_checkpoint

RigOf = Callable[..., Rig]


@pytest.fixture(scope="session")
def tinywan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of TinyWan."""
    return made_once(tmp_path_factory, "served-tinywan", lambda folder: import_checkpoint(folder, recipe="w8a8"))


@pytest.fixture
def rig(tinywan: Path, tmp_path: Path) -> Rig:
    """A supervisor whose child pretends to make clips."""
    return Rig(tmp_path, [tinywan])
