"""The same inputs give the same bytes, whoever runs the commands, where and when.

Each output is made twice in processes of their own, which differ in the seed of Python's hashes, the working directory,
the time zone, the language, the places of the bundle and of the package, the number of jobs and the order of targets.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tensorrt_flavours import rtx

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
GRAPHS = ("cross_kv", "block", "vae_decode_first", "vae_decode_next")
"""The graphs of which engines are built. Those of the VAE have many inputs and outputs, which TensorRT-RTX lists in the
order of their addresses."""

KERNELS = """
import sys
from pathlib import Path
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.runtime.commands.kernels import KernelsOptions
targets, jobs = sys.argv[1:]
asked = KernelsOptions(targets=tuple(targets.split(",")), models=("tinywan",), recipe="bf16-sla").launches()
one_of_each = {(launch.specialisation.kernel, launch.specialisation.sm): launch for launch in asked}
compile_kernels(one_of_each.values(), Path("kernels"), int(jobs))
"""
"""What `wanforge kernels` does, for one specialisation of each kernel."""


@dataclass(frozen=True)
class Setting:
    """One way to run wanforge: a folder to run it in, which holds the outputs, where the package is, and variables."""

    folder: Path
    package: Path
    variables: dict[str, str]

    def run(self, *arguments: str) -> None:
        self.python("-m", "wanforge", *arguments)

    def python(self, *arguments: str) -> None:
        environment = {
            **os.environ,
            **self.variables,
            "PYTHONPATH": str(self.package),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }
        command = [sys.executable, "-P", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setting, Setting]:
    folder: Path = tmp_path_factory.mktemp("settings")
    elsewhere = folder / "another" / "and a deeper folder"
    elsewhere.mkdir(parents=True)
    copied = shutil.copytree(ROOT / "src", folder / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    here = Setting(folder, ROOT / "src", {"PYTHONHASHSEED": "1", "TZ": "UTC"})
    there = Setting(elsewhere, Path(copied), {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "LANG": "de_DE.UTF-8"})
    return here, there


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path, except those that start with a dot: locks, and what is known of this machine's files."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def differing(one: Path, other: Path) -> list[str]:
    """Names of files that only one of two folders holds, or that differ."""
    left, right = contents(one), contents(other)
    assert left
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


@pytest.fixture(scope="module")
def bundles(settings: tuple[Setting, Setting]) -> tuple[Path, Path]:
    """One bundle in two places, exported at each."""
    here, there = settings
    here.run("import", "--recipe", "w8a8", "--out", "imported")
    one, other = here.folder / "b", there.folder / "bundle of another name"
    for setting, bundle in ((here, one), (there, other)):
        shutil.copytree(here.folder / "imported", bundle)
        setting.run("export", bundle.name)
    return one, other


def test_an_export(bundles: tuple[Path, Path]) -> None:
    assert differing(*bundles) == []


@pytest.mark.exhaustive
def test_kernels(settings: tuple[Setting, Setting]) -> None:
    here, there = settings
    here.python("-c", KERNELS, "sm_80,sm_89", "1")
    there.python("-c", KERNELS, "sm_89,sm_80", "3")
    assert differing(here.folder / "kernels", there.folder / "kernels") == []


def test_engines(settings: tuple[Setting, Setting], bundles: tuple[Path, Path]) -> None:
    rtx()
    only = [word for graph in GRAPHS for word in ("--graph", graph)]
    for setting, bundle, targets in zip(settings, bundles, ("rtx4090,rtx5090", "rtx5090,rtx4090"), strict=True):
        setting.run("build", bundle.name, "--target", targets, *only)
    assert differing(*bundles) == []
