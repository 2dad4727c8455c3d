"""Mending a bundle as a person would: by the commands that the tool hints at."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.usage.commands import Ended, run
from tests.usage.folders import BUNDLE

HINT = re.compile(r"wanforge (?:import --resume|export|build)(?:(?!, |;|\n|`|\)).)*")
"""A command in a message that mends a bundle."""
MOST = 8
"""The most hints that it may take to mend a bundle."""
LOOK = ("inspect", BUNDLE, "--verify")


def hints(ended: Ended) -> list[tuple[str, ...]]:
    """The different commands that a message hints at, in their order."""
    return [tuple(shlex.split(found)[1:]) for found in dict.fromkeys(HINT.findall(ended.output))]


def mend(
    folder: Path,
    *,
    look: Callable[[], Ended] | None = None,
    follow: Callable[[tuple[str, ...]], Ended] | None = None,
) -> Iterator[Ended]:
    """Follow the first hint of every message until there are none, and yield how every command ended.

    Args:
        look: The command that gives the hints, ``wanforge inspect --verify`` by default.
        follow: Runs the command of a hint.
    """
    for _ in range(MOST):
        looked = look() if look else run(LOOK, folder)
        yield looked
        found = hints(looked) if looked.code else []
        if not found:
            return
        yield follow(found[0]) if follow else run(found[0], folder)
