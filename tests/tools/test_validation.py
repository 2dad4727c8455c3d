"""The page's comparison with what others have measured is what the code predicts."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_page_holds_the_comparison() -> None:
    pinned = re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    if version("triton") != pinned[1]:
        pytest.skip(f"the page was made with triton {pinned[1]}, this is {version('triton')}")
    page = (ROOT / "docs" / "kernels.md").read_text()
    stated = re.search(r"<!-- python -m tools\.validation -->\n\n(.*?)\n\n<!-- end of validation -->", page, re.DOTALL)
    assert stated is not None
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-m", "tools.validation"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == stated[1], "update docs/kernels.md with: python -m tools.validation"
