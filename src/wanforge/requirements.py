"""The packages that wanforge needs, read from its own metadata, and the commands that install them here."""

import re
import shlex
import sys
from importlib.metadata import requires
from typing import TYPE_CHECKING

from wanforge.version import PACKAGE

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTIONS = {"PIL": "pillow", "cuda": "cuda-python", "pynvml": "nvidia-ml-py"}
"""The packages whose modules have another name."""


def pip_install(*arguments: str) -> str:
    """The command that installs something for the Python that runs this, quoted for a shell."""
    return shlex.join([sys.executable, "-m", "pip", "install", *arguments])


def install_extra(extra: str, *options: str) -> str:
    """The command that installs an extra, such as ``gpu`` or ``serve``.

    It names the packages of the extra, because pip would look up ``wanforge[gpu]`` in an index. Where the metadata is
    missing, wanforge runs from a checkout, and the command installs that.

    Args:
        options: Options of ``pip install``.
    """
    found = [_spelling(each) for each in _declared() if not _is_needed(each) and _is_needed(each, extra)]
    return pip_install(*options, *(found or [f"{PACKAGE.resolve().parents[1]}[{extra}]"]))


def install_package(name: str, *options: str) -> str:
    """The command that installs a package in a version that wanforge works with.

    For a package that wanforge does not name itself, it installs all that wanforge needs, which brings it along.

    Args:
        name: Name of the package, or of a module in it.
        options: Options of ``pip install``.
    """
    top = name.partition(".")[0]
    wanted = _canonical(DISTRIBUTIONS.get(top, top))
    found = [_spelling(each) for each in _declared() if _canonical(each.name) == wanted][:1]
    everything = [_spelling(each) for each in _declared() if _is_needed(each)]
    return pip_install(*options, *(found or everything or [str(PACKAGE.resolve().parents[1])]))


def _declared() -> "list[Requirement]":
    """The requirements in the metadata of wanforge; none if there is no metadata, or nothing that can read it."""
    try:
        from packaging.requirements import Requirement

        return [Requirement(line) for line in requires("wanforge") or ()]
    except ModuleNotFoundError:  # PackageNotFoundError is one of them
        return []


def _canonical(name: str) -> str:
    """The name of a package as indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_needed(requirement: "Requirement", extra: str = "") -> bool:
    """Whether this machine needs a package, with an extra or without any."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _spelling(requirement: "Requirement") -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"
