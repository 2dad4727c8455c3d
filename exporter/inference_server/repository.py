"""Model repositories on disk: written whole or not at all, and written over only if nobody has edited them.

REPOSITORY/
  export.json                what wrote it: the files, with the SHA-256 of those that people may edit
  constraints.txt            the versions of the packages on the machine that wrote it, for pip
  MODEL/config.pbtxt
  MODEL/1/model.py           names the class that serves the model
  MODEL/1/bundle/            the bundle, of the first model only, unless it stays where it is
"""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from wanforge.configs.loading import Record
from wanforge.engines.bundle.bundle import VERIFIED, Bundle
from wanforge.engines.bundle.lock import CHANGES_LOCK, FILES_LOCK, MANIFEST_LOCK
from wanforge.engines.bundle.manifest import MANIFEST
from wanforge.engines.bundle.tensorfile import sha256_of
from wanforge.errors import ConfigError
from wanforge.exporter.inference_server.configuration import ModelSetup, configuration
from wanforge.progress import ByteCount, Progress, silent
from wanforge.version import __version__
from wanforge.whole_file import PARTIAL, open_folders, write_atomically

MARKER, KIND = "export.json", "a model repository of Triton Inference Server"
VERSION = "1"
"""The version of each model, whose folder is named after it."""
PACKAGES = ("torch", "numpy", "onnxruntime", "tokenizers", "ftfy", "pillow", "cuda-python", "tensorrt-rtx", "tensorrt")
"""The packages besides wanforge on whose versions it depends what a clip is."""
COMPILER = "triton"
"""The compiler of the kernels, which is named in a remark, because pip would refuse it beside PyTorch
(docs/decisions/0019)."""
LEFT_BY_USE = {"__pycache__", VERIFIED, CHANGES_LOCK, FILES_LOCK, MANIFEST_LOCK}
"""The names of what appears in a repository by serving it."""

MODEL_PY = '''"""Serves the model {name} with wanforge, as its docs/triton.md describes."""

from pathlib import Path

from {module} import {code}


class TritonPythonModel({code}):
    """{code}, with the files beside this one."""

    folder = Path(__file__).parent
'''


class Marker(Record, frozen=True):
    """What tells that a folder was exported.

    Attributes:
        written: The SHA-256 of each text file that was written, by its path in the repository.
        put: The paths in the repository of the files of the bundle.
    """

    kind: str
    wanforge: str
    written: dict[str, str]
    put: list[str]


def write_repository(
    out: Path, models: Sequence[ModelSetup], bundle: Bundle | None, progress: Progress = silent
) -> Path:
    """Write a model repository.

    Args:
        out: Its folder, which is replaced if it is an older export that nobody has edited.
        bundle: The bundle that is put into the first model; None if it stays where it is.

    Raises:
        ConfigError: The folder holds something else, or an export that was edited.
        BundleError: A file of the bundle is missing.
        OSError: It cannot be written.
    """
    check_replaceable(out)
    with new_folder(out) as folder:
        texts = texts_of(models)
        for name, text in texts.items():
            write_atomically(folder / name, text.encode())
        put: list[str] = []
        if bundle is not None:
            place = f"{models[0].name}/{VERSION}/bundle"
            put = [f"{place}/{name}" for name in put_bundle(bundle, folder / place, progress)]
        written = {name: sha256_of(folder / name) for name in texts}
        marker = msgspec.json.format(msgspec.json.encode(Marker(KIND, __version__, written, put)), indent=2)
        write_atomically(folder / MARKER, marker)
        check_replaceable(out)  # again: copying takes a while
        replace_folder(folder, out)
    return out


def texts_of(models: Sequence[ModelSetup]) -> dict[str, str]:
    """The text files of a repository, by their paths in it."""
    found = {"constraints.txt": constraints()}
    for model in models:
        found[f"{model.name}/config.pbtxt"] = configuration(model)
        found[f"{model.name}/{VERSION}/model.py"] = MODEL_PY.format(
            name=model.name, module=model.code.__module__, code=model.code.__name__
        )
    return found


def constraints() -> str:
    """The versions of packages here, as constraints for pip in the image that serves the bundle."""
    found = {name: version_of(name) for name in (*PACKAGES, COMPILER)}
    lines = [f"{name}=={number}" for name, number in found.items() if number and name != COMPILER]
    remark = f"# Afterwards, without dependencies: {COMPILER}=={found[COMPILER]}" if found[COMPILER] else ""
    head = "# The versions on the machine that exported this repository."
    return "\n".join([head, f"wanforge=={__version__}", *lines, remark, ""])


def version_of(package: str) -> str:
    """The version of a package, as an index has it; empty if it is not installed."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""


def put_bundle(bundle: Bundle, place: Path, progress: Progress) -> list[str]:
    """Put the files of a bundle into a folder: hard links where it lies on the same disk, and copies elsewhere. Links
    to files outside of the bundle become files. Returns their names."""
    bundle.hold()
    names = [*bundle.manifest.files, MANIFEST]
    sources = {name: (bundle.root / name if name == MANIFEST else bundle.path(name)).resolve() for name in names}
    count = ByteCount(progress, "bundle", sum(source.stat().st_size for source in sources.values()))
    for name, source in sources.items():
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source, target)
        count(target.stat().st_size)
    return names


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be done."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_replaceable(out: Path) -> None:
    """Refuse a folder whose contents would be lost.

    Raises:
        ConfigError: It is something else than an export that nobody has edited.
    """
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise ConfigError(f"{out}: is not a folder; give another place with --out")
    if not any(out.iterdir()):
        return
    marker = marker_of(out)
    if marker is None:
        raise ConfigError(f"{out}: holds something else than an older export; give an empty or new folder with --out")
    for name, digest in marker.written.items():
        if not (out / name).is_file() or sha256_of(out / name) != digest:
            raise ConfigError(f"{out / name}: was edited since it was exported; move {out} away, or give another --out")
    if added := sorted(added_files(out, marker)):
        raise ConfigError(f"{out}: holds {added[0]}, which was not exported; move it away, or give another --out")


def added_files(out: Path, marker: Marker) -> set[str]:
    """The paths of files and links in an export that neither the export nor its use has made."""
    found = {path.relative_to(out) for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    return {path.as_posix() for path in found if not LEFT_BY_USE & set(path.parts)} - {
        MARKER,
        *marker.written,
        *marker.put,
    }


def marker_of(folder: Path) -> Marker | None:
    """The marker of an export; None if the folder is something else."""
    try:
        found = msgspec.json.decode((folder / MARKER).read_bytes(), type=Marker)
    except (OSError, msgspec.DecodeError):
        return None
    return found if found.kind == KIND else None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Make a folder beside `out` under a temporary name; whoever fills it renames it, and otherwise it is deleted."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{secrets.token_hex(4)}{PARTIAL}"
    folder.mkdir()
    open_folders.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        open_folders.discard(folder)


def replace_folder(folder: Path, out: Path) -> None:
    """Let a folder take the place of `out`."""
    with new_folder(out) as aside:
        if out.exists():
            out.rename(aside / "old")
        try:
            folder.rename(out)
        except OSError:
            if (aside / "old").exists():
                (aside / "old").rename(out)
            raise


def described(models: Sequence[ModelSetup]) -> Mapping[str, str]:
    """What each model does, by name, for people."""
    return {model.name: (model.code.__doc__ or "").partition("\n")[0] for model in models}
