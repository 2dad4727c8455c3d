"""What is published is complete: the sdist is the checkout, and the wheel runs alone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*arguments: object, folder: Path, path: str = "") -> str:
    """The output of Python with some arguments in a folder."""
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def packed(target: str, folder: Path) -> Path:
    """Build an sdist or a wheel from this checkout."""
    pytest.importorskip("hatchling")
    search_path = os.pathsep.join(path for path in sys.path if path)
    run("-m", "hatchling", "build", "-t", target, "-d", folder, folder=ROOT, path=search_path)
    (path,) = folder.iterdir()
    return path


def test_the_sdist_holds_every_file_and_link_of_the_checkout(tmp_path: Path) -> None:
    git = ("git", "-C", str(ROOT), "ls-files", "--stage")
    listed = subprocess.run(git, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no checkout")
    tracked = {name: mode for mode, _, _, name in (line.split(maxsplit=3) for line in listed.stdout.splitlines())}
    with tarfile.open(packed("sdist", tmp_path)) as archive:
        found = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert set(tracked) - set(found) == set()
    links = {name: os.readlink(ROOT / name) for name, mode in tracked.items() if mode == "120000"}
    assert links
    assert {name: member.linkname for name, member in found.items() if member.issym()} == links


def test_the_wheel_makes_a_clip_outside_of_the_checkout(tmp_path: Path) -> None:
    with zipfile.ZipFile(packed("wheel", tmp_path / "dist")) as archive:
        archive.extractall(tmp_path / "site")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for command in (
        "import --out b",
        "export b --dtype fp32",
        "generate b --prompt kite --frames 5 --steps 1 --out c.mp4",
    ):
        run("-P", "-m", "wanforge", *command.split(), folder=folder, path=str(tmp_path / "site"))
    assert (folder / "c.mp4").stat().st_size > 0
    code = "import wanforge; print(wanforge.__file__)"
    found = run("-P", "-c", code, folder=folder, path=str(tmp_path / "site")).strip()
    assert Path(found) == tmp_path / "site" / "wanforge" / "__init__.py"
