"""The version of wanforge, and the commit if it runs from a checkout."""

import subprocess
from pathlib import Path

__version__ = "0.2.0"

PACKAGE = Path(__file__).parent
"""The folder of the package."""


def commit() -> str | None:
    """The commit of this code, followed by ``-dirty`` if files have changed since; None outside of a checkout."""
    file = Path(__file__).resolve()
    git = ("git", "-C", str(file.parent))
    if not output_of(*git, "ls-files", file.name):
        return None
    return output_of(*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def version_text() -> str:
    """The version as users see it: ``0.2.0``, with the commit if there is one."""
    found = commit()
    if found is None:
        return __version__
    number, dash, dirty = found.partition("-")
    return f"{__version__} (commit {number[:12]}{dash}{dirty})"


def output_of(*command: str) -> str | None:
    """The output of a program; None if it is not installed, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
