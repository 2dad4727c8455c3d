"""The version, and the commit where wanforge runs from a checkout."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from wanforge import __version__, version
from wanforge.cli import cli

ROOT = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit that holds the version module."""
    module = tmp_path / "version.py"
    shutil.copy(version.__file__, module)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "version.py")
    git(tmp_path, "commit", "--quiet", "--message", "Begin")
    monkeypatch.setattr(version, "__file__", str(module))
    return tmp_path


def test_the_commit_is_told_and_whether_files_have_changed(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert version.commit() == head
    assert version.version_text() == f"{__version__} (commit {head[:12]})"
    (checkout / "version.py").write_text("changed")
    assert version.commit() == f"{head}-dirty"
    assert version.version_text() == f"{__version__} (commit {head[:12]}-dirty)"


def test_a_tag_does_not_stand_for_the_commit(checkout: Path) -> None:
    git(checkout, "tag", "v1")
    assert version.commit() == git(checkout, "rev-parse", "HEAD")


def test_an_installed_copy_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a virtual environment inside a checkout, whose files git does not track."""
    installed = checkout / "site-packages" / "version.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(version, "__file__", str(installed))
    assert version.commit() is None
    assert version.version_text() == __version__


def test_the_command_prints_it_and_loads_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['wanforge', '--version']\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "from wanforge.cli import main; main()"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
        check=True,
    )
    assert re.fullmatch(
        rf"wanforge {re.escape(__version__)}( \(commit [0-9a-f]{{12}}(-dirty)?\))?", done.stdout.strip()
    )
    assert CliRunner().invoke(cli, ["--version"]).output.startswith(f"wanforge {__version__}")


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wanforge", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
        check=True,
    )
    assert done.stdout.startswith(f"wanforge {__version__}")


def test_the_project_takes_its_version_from_the_code() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert (ROOT / project["tool"]["hatch"]["version"]["path"]).resolve() == Path(version.__file__).resolve()
