"""Folders in which supervisors work."""

from pathlib import Path

import pytest

from tests.runtime.service.workers.rig import Rig


@pytest.fixture
def rig(tinywan: Path, tmp_path: Path) -> Rig:
    """A supervisor whose child pretends to make clips."""
    return Rig(tmp_path, [tinywan])
