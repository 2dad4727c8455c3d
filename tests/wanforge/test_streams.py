"""A command goes on quietly when nobody reads what it prints."""

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT, start

PRINTS = """
import sys
from wanforge.streams import patient_streams
with patient_streams():
    for line in range(100_000):
        print(line)
    print("done", file=sys.stderr)
"""


def shell(redirection: str, code: str = PRINTS) -> subprocess.CompletedProcess[str]:
    """Run Python code in a shell that redirects its output, and print its exit code."""
    return subprocess.run(
        ["bash", "-c", f'{{ {sys.executable} -c "$CODE"; echo "code $?" >&2; }} {redirection}'],
        capture_output=True,
        text=True,
        env={**os.environ, "CODE": code, "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )


def test_a_reader_that_leaves_stops_nothing() -> None:
    done = shell("| head -n 2")
    assert done.stdout == "0\n1\n"
    assert done.stderr == "done\ncode 0\n"


def test_without_a_reader_of_messages_the_results_are_printed() -> None:
    code = """
import sys, time
from wanforge.streams import patient_streams
with patient_streams():
    time.sleep(0.2)
    for line in range(3):
        print("message", file=sys.stderr)
    print("result")
"""
    done = shell("2> >(exec true)", code)
    assert done.stdout == "result\n"


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_lead_to_nowhere(redirection: str) -> None:
    code = """
import os, sys
from wanforge.streams import patient_streams
with patient_streams():
    opened = os.open(os.devnull, os.O_RDONLY)
    print("result", file=sys.stdout)
    print("message", file=sys.stderr)
    sys.exit(0 if opened > 2 else 7)
"""
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$CODE" {redirection}'],
        capture_output=True,
        text=True,
        env={**os.environ, "CODE": code, "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout == ("" if ">&-" in redirection.replace("2>&-", "") else "result\n")
    assert done.stderr == ("" if "2>&-" in redirection else "message\n")


def test_a_full_disk_is_an_error_once() -> None:
    code = """
import sys
from wanforge.streams import patient_streams
with patient_streams():
    for line in range(3):
        try:
            print(line, flush=True)
        except OSError as error:
            print(error, file=sys.stderr)
"""
    done = shell("> /dev/full", code)
    assert done.stderr == "[Errno 28] No space left on device: 'the standard output'\ncode 0\n"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--help", "--version", "import --help"])
def test_help_that_cannot_be_printed_is_an_error_without_a_traceback(arguments: str) -> None:
    done = shell(
        "> /dev/full", f"import sys; sys.argv[1:] = {arguments.split()}; from wanforge.cli import main; main()"
    )
    assert done.stderr == (
        "Error: No space left on device at the standard output; free some space or choose another place\ncode 1\n"
    )


@pytest.mark.parametrize("buffered", ["", "1"])
def test_messages_appear_at_once(buffered: str) -> None:
    code = """
import sys
from wanforge.streams import patient_streams
with patient_streams():
    print("message", file=sys.stderr)
    sys.stdin.read()
"""
    process = start(code, PYTHONUNBUFFERED=buffered)
    assert process.stderr is not None
    assert process.stderr.readline() == "message\n"
    process.communicate()
