"""Compiled kernels on disk: folders of cubins and their manifests. Reading them does not need Triton."""

import ast
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Literal

import msgspec

from wanforge.configs.loading import Record
from wanforge.errors import ResourceError
from wanforge.plugins.launching import Constant
from wanforge.plugins.launching.grid import PARSING
from wanforge.version import PACKAGE, __version__
from wanforge.whole_file import write_atomically

MANIFEST = "manifest.json"
FORMAT: Literal[1] = 1


class Cubin(Record, frozen=True):
    """One compiled kernel: everything needed to launch it, and the resources it uses."""

    key: str
    """Key of the `Specialisation` it was compiled for."""
    kernel: str
    sm: int
    file: str
    sha256: str
    bytes: int
    entry: str
    """Name of the function in the file."""
    parameters: tuple[tuple[str, str], ...]
    """Name and type of each run-time parameter, in order. Two null scratch pointers follow them in a launch. A tensor
    map is 128 bytes at a multiple of 64, and its sizes and strides are parameters behind it."""
    constants: dict[str, Constant]
    grid: tuple[str, ...]
    """Number of programs along each axis, as rules for `grid.evaluate`."""
    threads: int
    num_stages: int
    shared_bytes: int
    """Dynamic shared memory of one program."""
    tensor_memory: int
    """Columns of tensor memory that one program uses, out of 512; 0 below sm_100, which has no tensor memory."""
    registers: int
    spill_bytes: int
    """Local memory of one thread, which holds what did not fit in its registers."""
    mma: tuple[str, ...]
    """The kinds of tensor-core instruction in the machine code."""
    source_hash: str
    triton: str
    warnings: tuple[str, ...] = ()
    """What the assembler says of instructions that run one after the other although they could overlap."""


class CubinManifest(Record, frozen=True):
    """The contents of a folder of cubins."""

    format: Literal[1]
    made_by: str
    cubins: list[Cubin]


def cache_folder() -> Path:
    """The folder where cubins are kept unless a command names another.

    Raises:
        ResourceError: This user has no home folder.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "wanforge" / "kernels"
    except RuntimeError:
        raise ResourceError("there is no home folder to keep a cache in; set XDG_CACHE_HOME to a folder") from None


def folders() -> list[Path]:
    """The folders that are searched for cubins: the one WANFORGE_KERNELS names, then the cache."""
    shipped = os.environ.get("WANFORGE_KERNELS")
    return [*([Path(shipped)] if shipped else []), cache_folder()]


class CubinStore:
    """A folder of cubins and their manifest. Several processes may add to the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def cubins(self) -> dict[str, Cubin]:
        """The cubins in the manifest by the key of their specialisation; empty if there is no manifest.

        Raises:
            ResourceError: The manifest cannot be decoded.
        """
        path = self.folder / MANIFEST
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=CubinManifest)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ResourceError(
                f"{path}: damaged, or written by another version ({error}); delete it and run `wanforge kernels` again"
            ) from None
        return {cubin.key: cubin for cubin in manifest.cubins}

    def read(self, cubin: Cubin) -> bytes:
        """Return the machine code of a cubin.

        Raises:
            ResourceError: The file is missing, or its SHA-256 differs from the recorded one.
        """
        path = self.folder / cubin.file
        remedy = f"compile it again with: wanforge kernels --target sm_{cubin.sm} --out {self.folder}"
        try:
            code = path.read_bytes()
        except FileNotFoundError:
            raise ResourceError(f"{path}: missing; {remedy}") from None
        if (found := hashlib.sha256(code).hexdigest()) != cubin.sha256:
            raise ResourceError(
                f"{path}: damaged; its SHA-256 is {found[:12]}…, but {cubin.sha256[:12]}… was recorded; {remedy}"
            )
        return code

    def ptx_path(self, cubin: Cubin) -> Path:
        """Where the PTX of a cubin is, if it was kept."""
        return (self.folder / cubin.file).with_suffix(".ptx")

    def add(self, cubin: Cubin, code: bytes, ptx: str | None = None) -> None:
        """Add a cubin, replacing the one with the same key; the manifest is written after the cubin and its PTX."""
        with self._locked():
            write_atomically(self.folder / cubin.file, code)
            if ptx is not None:
                write_atomically(self.ptx_path(cubin), ptx.encode())
            cubins = self.cubins()
            replaced = cubins.get(cubin.key)
            cubins[cubin.key] = cubin
            ordered = sorted(cubins.values(), key=lambda cubin: (cubin.kernel, cubin.sm, cubin.key))
            data = msgspec.json.encode(CubinManifest(FORMAT, f"wanforge {__version__}", ordered))
            write_atomically(self.folder / MANIFEST, msgspec.json.format(data, indent=1))
            if replaced is not None and replaced.file != cubin.file:
                (self.folder / replaced.file).unlink(missing_ok=True)
                self.ptx_path(replaced).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def source_hash(op: str) -> str:
    """SHA-256 of an op's kernels, of the wanforge modules that they import, and of the one with the compiler's options.
    The files are read, not imported."""
    sources: dict[str, bytes] = {}
    waiting = [f"wanforge.plugins.{op}.kernel", "wanforge.plugins.launching.worker"]
    while waiting:
        module = waiting.pop()
        path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        if module not in sources and path.is_file():
            sources[module] = path.read_bytes()
            waiting += _imported(module, sources[module])
    digest = hashlib.sha256()
    for module, source in sorted(sources.items()):
        digest.update(f"{module} {len(source)}\n".encode() + source)
    return digest.hexdigest()


@cache
def _imported(module: str, source: bytes) -> tuple[str, ...]:
    """The imported names in a module's source that may be wanforge modules."""
    with PARSING:
        tree = ast.parse(source)
    found: list[str] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        found += (name for name in names if name.startswith("wanforge."))
    return tuple(found)
