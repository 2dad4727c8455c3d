"""Parts for tests: each does one thing."""

import os
import subprocess
import time

from tools.gpu_day.day import Day


def finds(day: Day) -> None:
    """Keep a result."""
    day.add("found", number=1)


def fails(day: Day) -> None:
    """Keep a result, and fail."""
    day.add("found", number=1)
    raise RuntimeError("the part is broken")


def fails_in_one_piece(day: Day) -> None:
    """Do two pieces of work, of which the first fails."""

    def broken() -> dict[str, int]:
        raise RuntimeError("the piece is broken")

    day.once("piece", "first", broken)
    day.once("piece", "second", lambda: {"number": 2})


def hangs(day: Day) -> None:
    """Start two processes, one in a session of its own, and wait far too long."""
    children = [subprocess.Popen(["sleep", "600"], start_new_session=apart) for apart in (False, True)]
    day.add("children", pids=[child.pid for child in children], own=os.getpid())
    time.sleep(600)
