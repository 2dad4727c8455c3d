"""Kernels that are compiled once for all tests of a run, and read once for those of a file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import shared_folder
from tools.ptx.syntax import forget_kernels


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """Let go of kernels after each file."""
    yield
    forget_kernels()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of cubins and their PTX, to which every process of this run adds what it compiles."""
    return shared_folder(tmp_path_factory) / "ptx"
