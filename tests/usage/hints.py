"""Mending a bundle as a person would: by the commands that the tool hints at."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.usage.commands import Ended, run
from tests.usage.folders import BUNDLE

HINT = re.compile(r"wanforge (?:import --resume|export|build)(?:(?!, |;|\n|`).)*")
"""A command in a message that mends a bundle."""
MOST = 8
"""The most commands that mending a bundle may take."""


def hints(ended: Ended) -> list[list[str]]:
    """The different commands that a message hints at, in their order."""
    return [shlex.split(found)[1:] for found in dict.fromkeys(HINT.findall(ended.output))]


def mend(folder: Path) -> Iterator[Ended]:
    """Follow the first hint of ``wanforge inspect``, until it gives none. Yields all commands and how they ended."""
    for _ in range(MOST):
        ended = run(("inspect", BUNDLE, "--verify"), folder)
        if not ended.code:
            return
        if not hints(ended):
            yield ended
            return
        yield run(hints(ended)[0], folder)
