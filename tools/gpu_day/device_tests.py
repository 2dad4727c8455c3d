"""The part that runs those tests of the kernels that use a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tools.gpu_day.day import Day
from wanforge.whole_file import temporary_folder

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "tests/plugins/test_norm_kernels.py",
    "tests/plugins/test_channel_norm.py",
    "tests/plugins/test_int8_convolution.py",
    "tests/plugins/test_w8a8_kernels.py",
    "tests/plugins/test_attention_kernels.py",
    "tests/plugins/test_row_moments.py",
    "tests/plugins/test_recall.py",
)
"""The tests whose tensors are on `tests.plugins.kernels.DEVICE`. All others interpret kernels, and would show nothing
about a GPU."""
MOST_SAID = 1500
"""The most characters that are kept of what a failed test says."""


def run(day: Day) -> None:
    """Run them in several processes, and keep the outcome of each. They stop in time for their report to be read."""
    with temporary_folder() as folder:
        report, said = folder / "report.xml", folder / "said"
        with said.open("wb") as file:
            done = subprocess.run(
                command(day, report), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False, env=variables(day)
            )
        tail = said.read_text(errors="replace")[-3000:]
        cases = list(outcomes(report)) if report.exists() else []
    counts = {state: sum(each["state"] == state for each in cases) for state in ("passed", "failed", "skipped")}
    day.add("tests", exit=done.returncode, **counts, tail=tail if done.returncode else "")
    for case in cases:
        if case["state"] == "failed":
            day.add("failed test", **case)
    if done.returncode:
        raise SystemExit(f"pytest ended with {done.returncode}")


def command(day: Day, report: Path) -> list[str]:
    """pytest without what a checkout that cannot be written lacks, and without the warnings of another PyTorch as
    errors."""
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", f"--junitxml={report}"]
    if day.rehearses:
        few = f"{FILES[0]}::test_gated_residual_is_the_reference_to_the_bit"
        return [
            sys.executable,
            "-m",
            "pytest",
            *options,
            "-p",
            "tools.gpu_day.on_stand_in",
            "-k",
            "float16 and ragged",
            few,
        ]
    processes = min(8, os.cpu_count() or 1)
    return [sys.executable, "-m", "pytest", *options, "-n", str(processes), *FILES]


def variables(day: Day) -> dict[str, str]:
    return {**os.environ, "WANFORGE_REHEARSAL": str(day.paths.scratch / "kernels")}


def outcomes(report: Path) -> list[dict[str, Any]]:
    """The name, state and message of each test of a report in JUnit's format."""
    found = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        wrong = [each for each in case if each.tag in ("failure", "error")]
        state = "failed" if wrong else "skipped" if case.find("skipped") is not None else "passed"
        said = (wrong[0].get("message") or wrong[0].text or "")[:MOST_SAID] if wrong else ""
        found.append({"name": f"{case.get('classname')}::{case.get('name')}", "state": state, "said": said})
    return found
