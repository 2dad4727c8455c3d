"""A bundle of TinyWan for batches."""

from pathlib import Path

import pytest

from tests.conftest import made_once
from wanforge.api import import_checkpoint


@pytest.fixture(scope="session")
def tinywan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of TinyWan."""
    return made_once(tmp_path_factory, "served-tinywan", lambda folder: import_checkpoint(folder, recipe="w8a8"))
