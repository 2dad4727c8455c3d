"""The dependency groups of pyproject.toml, and Python as it is where only the packages of one are installed."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.processes import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
GROUPS = ("api", "cpu", "cuda", "rtx")

ALONE = """
import sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions

from packaging.utils import canonicalize_name

known = set({known!r})


class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in absent else PathFinder.find_spec(name, path, target)


absent = {{
    module
    for module, names in packages_distributions().items()
    if not known.intersection(map(canonicalize_name, names)) and module != "wanforge"
}}
sys.meta_path[sys.meta_path.index(PathFinder)] = Present
"""


def group(name: str) -> list[str]:
    """The requirements of a group, with those of the groups that it includes."""
    found: list[str] = []
    for each in PROJECT["dependency-groups"][name]:
        found += group(each["include-group"]) if isinstance(each, dict) else [each]
    return found


def closure(requirements: Iterable[str]) -> set[str]:
    """The names of packages, and of all that they need."""
    found: set[str] = set()
    asked = [(requirement, "") for requirement in map(Requirement, requirements)]
    seen = set()
    while asked:
        requirement, extra = asked.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            name = canonicalize_name(requirement.name)
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            found.add(name)
            try:
                asked += [(Requirement(line), wanted) for line in requires(name) or ()]
            except PackageNotFoundError:  # not installed here, so nothing of it can be imported either
                continue
    return found


def alone(name: str, code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run code in a Python that has only what a group brings."""
    before = ALONE.format(known=sorted(closure(group(name))))
    return subprocess.run(
        [sys.executable, "-c", before + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
