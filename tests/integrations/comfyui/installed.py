"""The command of an installed wanforge, which knows by itself where its packages are."""

import shlex
import sys
from pathlib import Path

from tests.processes import ROOT


def command_of_wanforge(folder: Path) -> Path:
    """Write the command below a folder, where it takes one processor."""
    path = folder / "an installed" / "wanforge"
    path.parent.mkdir()
    source, python = shlex.quote(str(ROOT / "src")), shlex.quote(sys.executable)
    path.write_text(f'#!/bin/sh\nPYTHONPATH={source} OMP_NUM_THREADS=1 exec {python} -m wanforge "$@"\n')
    path.chmod(0o755)
    return path
