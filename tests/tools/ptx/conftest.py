"""Kernels that are compiled once for all tests of a run."""

from pathlib import Path

import pytest

from tests.conftest import shared_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of cubins and their PTX, to which every process of this run adds what it compiles."""
    return shared_folder(tmp_path_factory) / "ptx"
