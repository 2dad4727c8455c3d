"""A plugin of pytest: kernels whose tensors are on the CPU run on the machine for PTX instead of being interpreted."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from tools.gpu_day.device import StandIn

FOLDER = "WANFORGE_REHEARSAL"
"""The variable that names the folder of cubins."""
entered = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    entered.enter_context(StandIn(Path(os.environ[FOLDER])).entered())


def pytest_unconfigure(config: pytest.Config) -> None:
    entered.close()
