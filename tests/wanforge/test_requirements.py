"""Every hint that names a package is a command that installs it here, with the versions of the project's metadata."""

import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from wanforge import requirements
from wanforge.requirements import install_extra, install_package
from wanforge.version import PACKAGE

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "install"]
METADATA = [
    "click>=8.1",
    "pillow>=11",
    "triton>=3.6; sys_platform == 'nowhere'",
    "cuda-python>=12.9; extra == 'gpu'",
    "nvidia-ml-py>=12.535,<14; extra == 'gpu'",
    "diffusers==0.42.1; extra == 'dev'",
    "psycopg[binary]>=3.2; extra == 'postgres'",
]


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "requires", lambda name: METADATA)


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "requires", absent)


@pytest.mark.usefixtures("declared")
def test_an_extra_is_spelled_out_for_the_python_that_runs_this() -> None:
    assert shlex.split(install_extra("gpu")) == [*PIP, "cuda-python>=12.9", "nvidia-ml-py<14,>=12.535"]
    assert shlex.split(install_extra("gpu", "--upgrade"))[4:6] == ["--upgrade", "cuda-python>=12.9"]


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("click", "click>=8.1"),
        ("PIL.Image", "pillow>=11"),
        ("cuda.bindings", "cuda-python>=12.9"),
        ("triton.language", "triton>=3.6"),
        ("diffusers", "diffusers==0.42.1"),
        ("psycopg", "psycopg[binary]>=3.2"),
    ],
)
def test_a_package_is_found_by_its_name_or_a_module_of_it(name: str, package: str) -> None:
    assert shlex.split(install_package(name)) == [*PIP, package]


@pytest.mark.usefixtures("declared")
def test_a_package_that_another_one_brings_comes_with_all_that_is_needed() -> None:
    assert shlex.split(install_package("google.protobuf")) == [*PIP, "click>=8.1", "pillow>=11"]


@pytest.mark.usefixtures("uninstalled")
def test_without_metadata_the_checkout_is_installed() -> None:
    assert shlex.split(install_extra("gpu")) == [*PIP, f"{PACKAGE.resolve().parents[1]}[gpu]"]
    assert shlex.split(install_package("torch")) == [*PIP, str(PACKAGE.resolve().parents[1])]


@pytest.mark.parametrize("extra", ["gpu", "rtx", "tensorrt", "hub", "gguf", "serve", "postgres", "s3", "otel"])
def test_the_extras_are_those_of_the_project(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert shlex.split(install_extra(extra)) == [*PIP, *project["optional-dependencies"][extra]]


def test_pinned_versions_are_ones_that_the_project_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.keys() == {"torch", "triton"}
    assert all(version in needed[name] for name, version in pinned.items())


def test_the_oldest_triton_that_is_tried_is_the_oldest_that_is_taken() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tried = re.search(r"triton==(\d+\.\d+)\.0$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tried is not None
    assert any(each.startswith(f"triton>={tried[1]};") for each in project["dependencies"])


@pytest.mark.slow
def test_the_command_is_one_that_a_shell_and_pip_understand() -> None:
    command = install_package("PIL", "--no-index", "--dry-run")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"already satisfied: pillow>=11", done.stdout)


def test_no_message_spells_a_command_of_pip_itself() -> None:
    floors = [PACKAGE, *(ROOT / name for name in ("configs", "plugins", "engines", "runtime", "exporter"))]
    sources = {path.resolve() for floor in floors for path in floor.rglob("*.py")}
    spelled = {path.name for path in sources if "pip install" in path.read_text()}
    assert spelled == {"requirements.py"}
