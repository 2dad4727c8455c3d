"""A clock that can be moved: the wall clock of a process, plus the seconds that a file says."""

import os
import time
from pathlib import Path

FILE = "WANFORGE_TRIAL_CLOCK"
"""The variable that names the file."""


def follow() -> None:
    """Let `time.time` of this process follow the file from now on. The monotonic clock stays as it is."""
    file, true = Path(os.environ[FILE]), time.time

    def moved() -> float:
        try:
            return true() + float(file.read_text())
        except (OSError, ValueError):
            return true()

    time.time = moved
