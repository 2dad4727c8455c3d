"""Make the one folder that a machine with a GPU and without a network needs.

    python -m tools.gpu_day.pack --out gpu-pack

It holds the checkout's files (``tree``), wheels of packages that such a machine may lack (``wheels``), cubins
(``kernels``), and what starts it all (``start.py``). If the folder is put into a checkout, ``tree`` can be left out.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from tools.gpu_day import start
from tools.gpu_day.kernels import always_needed, distinct
from wanforge.errors import ResourceError, WanforgeError
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import CubinStore, cache_folder

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 60_000_000
LEFT_OUT = ("tests/data/golden/", "docs/")
"""What neither the parts nor the tests of the kernels read."""
PACKAGES = ("msgspec", "ftfy", "wcwidth")
"""Small packages that wanforge needs beside PyTorch, Triton and ONNX. The video encoder is too large; clips are timed
without it."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def make_pack(out: Path, sm: int, python: str) -> int:
    """Make the folder, and return its bytes.

    Args:
        out: The folder; one that `make_pack` has made is replaced.
        python: The version of Python of the other machine, such as 3.12.

    Raises:
        ResourceError: It is too large, or something cannot be had.
    """
    if out.exists() and not (out / "start.py").exists():
        raise ResourceError(f"{out}: exists and is no pack; choose another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    copy_tree(out / "tree", tracked(ROOT))
    download(out / "wheels", as_here(PACKAGES), python)
    add_kernels(out / "kernels", sm)
    shutil.copyfile(start.__file__, out / "start.py")
    return check_size(out)


def tracked(root: Path) -> list[str]:
    """The files of a checkout that are needed, relative to it.

    Raises:
        ResourceError: It is no checkout.
    """
    done = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ResourceError(f"{root}: git does not list its files ({done.stderr.strip()}); use a checkout")
    return [name for name in done.stdout.split("\0") if name and not name.startswith(LEFT_OUT)]


def copy_tree(out: Path, names: Iterable[str]) -> None:
    """Copy files of the checkout. Links stay links."""
    for name in names:
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)


def as_here(packages: Sequence[str]) -> list[str]:
    """Packages in the versions that are installed here, with which the tests have run."""
    return [f"{name}=={version(name)}" for name in packages]


def download(out: Path, packages: Sequence[str], python: str) -> None:
    """Download the wheels of packages for another machine.

    Raises:
        ResourceError: pip cannot.
    """
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    kind = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(out), *kind, *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ResourceError(f"pip could not download {' '.join(packages)}: {done.stderr.strip()[-500:]}")


def add_kernels(out: Path, sm: int) -> None:
    """Compile the kernels that are always needed, or take those that this machine has compiled before."""
    wanted = distinct(always_needed(sm))
    cubins, store, target = compile_kernels(wanted, cache_folder()), CubinStore(cache_folder()), CubinStore(out)
    for cubin in cubins:
        target.add(cubin, store.read(cubin))


def check_size(out: Path) -> int:
    """The bytes of all files in a folder.

    Raises:
        ResourceError: They are too many.
    """
    sizes = {path: path.lstat().st_size for path in out.rglob("*") if path.is_file() or path.is_symlink()}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
        named = ", ".join(f"{path.relative_to(out)} ({sizes[path] / 1e6:.1f} MB)" for path in largest)
        raise ResourceError(
            f"{out}: {total / 1e6:.1f} MB, where {MOST_BYTES / 1e6:.0f} MB are allowed; the largest files are {named}. "
            "Leave some out with LEFT_OUT in tools/gpu_day/pack.py"
        )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_day.pack", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-pack"), help="the folder to make (gpu-pack)")
    parser.add_argument("--sm", type=int, default=90, help="the GPU's architecture (90)")
    parser.add_argument("--python", default="3.12", help="the version of Python there (3.12)")
    given = parser.parse_args()
    try:
        size = make_pack(given.out, given.sm, given.python)
    except WanforgeError as error:
        sys.exit(f"error: {error}")
    print(f"{given.out}: {size / 1e6:.1f} MB; there, run: python3 {given.out.name}/start.py --out OUT")


if __name__ == "__main__":
    main()
