"""The examples for clients do what they say, as they are printed."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.runtime.service.served import MADE, Rig, running
from tests.runtime.service.web.page.studio import clip, open_studio
from wanforge.runtime.service.settings import ServeSettings

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "integrations/service/examples"
PAGE = ROOT / "docs/serving.md"


@pytest.fixture
def guarded(tinywan: Path, tmp_path: Path) -> Iterator[Rig]:
    """A server with keys, and a worker that makes clips for it."""
    with running(ServeSettings(), [("", tinywan)], tmp_path, keys=True) as rig, open_studio(rig):
        yield rig


def run(command: Sequence[str], rig: Rig, folder: Path) -> str:
    """Run an example in a folder, and return what it prints."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    known = {"WANFORGE_URL": rig.url, "WANFORGE_API_KEY": rig.store.add_key("ann")[1]}
    environment = {**os.environ, **known, "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "command", "prints"),
    [
        ("curl.sh", ["sh"], "event: completed"),
        ("openai_client.py", [sys.executable], "completed {'text': 0.5}"),
        ("javascript.mjs", ["node"], "completed { text: 0.5 }"),
    ],
)
def test_an_example_makes_a_video(name: str, command: list[str], prints: str, guarded: Rig, tmp_path: Path) -> None:
    assert prints in run([*command, str(EXAMPLES / name)], guarded, tmp_path)
    assert (tmp_path / "clip.mp4").read_bytes() == clip(7)["video"][0]


def test_every_example_is_tried_and_named_in_the_documentation() -> None:
    names = {path.name for path in EXAMPLES.iterdir()}
    assert names == {"curl.sh", "openai_client.py", "javascript.mjs"}
    assert all(f"integrations/service/examples/{name}" in PAGE.read_text() for name in names)


def test_the_code_of_the_documentation_makes_a_video(guarded: Rig, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(from openai.*?)```", PAGE.read_text(), re.DOTALL)
    written = code.replace("http://127.0.0.1:8000", guarded.url).replace('"KEY"', repr(guarded.store.add_key("ann")[1]))
    run([sys.executable, "-c", written], guarded, tmp_path)
    assert (tmp_path / "clip.mp4").read_bytes() == clip(7)["video"][0] != MADE["video"][0]
