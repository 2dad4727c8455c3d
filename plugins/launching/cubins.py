"""Compiled kernels on disk: the folder that holds them and its manifest. Reading them needs no Triton."""

import ast
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    """One compiled kernel: all that it takes to launch it, and what it costs."""

    key: str
    """Of the `Specialisation` it was compiled for."""
    kernel: str
    sm: int
    file: str
    sha256: str
    bytes: int
    entry: str
    """Name of the function in the file."""
    parameters: tuple[tuple[str, str], ...]
    """Name and type of the run-time parameters, in order. Two scratch pointers follow, which are null."""
    constants: dict[str, Constant]
    grid: tuple[str, ...]
    """Programs along each axis, as `launch.evaluate` reads them."""
    threads: int
    num_stages: int
    shared_bytes: int
    """Dynamic shared memory of a program."""
    tensor_memory: int
    """Columns of tensor memory of a program, of 512; there is none below sm_100."""
    registers: int
    spill_bytes: int
    """Local memory of a thread: registers that did not fit."""
    mma: tuple[str, ...]
    """Kinds of tensor-core instruction in the machine code."""
    source_hash: str
    triton: str


class CubinManifest(Record, frozen=True):
    """What a folder of cubins holds."""

    format: Literal[1]
    made_by: str
    cubins: list[Cubin]


def cache_folder() -> Path:
    """Where cubins are kept unless a command says otherwise."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "wanforge" / "kernels"


def folders() -> list[Path]:
    """Where cubins are looked for: what WANFORGE_KERNELS names, then the cache."""
    shipped = os.environ.get("WANFORGE_KERNELS")
    return [*([Path(shipped)] if shipped else []), cache_folder()]


class CubinStore:
    """A folder of cubins and their manifest. Several processes may add to one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def cubins(self) -> dict[str, Cubin]:
        """What the manifest lists, by key of the specialisation; nothing where there is no manifest.

        Raises:
            ResourceError: the manifest makes no sense.
        """
        path = self.folder / MANIFEST
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=CubinManifest)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ResourceError(
                f"{path}: damaged, or of another version ({error}); delete it and run `wanforge kernels` again"
            ) from None
        return {cubin.key: cubin for cubin in manifest.cubins}

    def read(self, cubin: Cubin) -> bytes:
        """The machine code.

        Raises:
            ResourceError: the file is missing, or is not what was written.
        """
        path = self.folder / cubin.file
        remedy = f"make it again with: wanforge kernels --target sm_{cubin.sm} --out {self.folder}"
        try:
            code = path.read_bytes()
        except FileNotFoundError:
            raise ResourceError(f"{path}: missing; {remedy}") from None
        if (found := hashlib.sha256(code).hexdigest()) != cubin.sha256:
            raise ResourceError(
                f"{path}: damaged; its SHA-256 is {found[:12]}…, recorded is {cubin.sha256[:12]}…; {remedy}"
            )
        return code

    def add(self, cubin: Cubin, code: bytes) -> None:
        """Keep a cubin in place of the one of the same key; the manifest changes last."""
        with self._locked():
            write_atomically(self.folder / cubin.file, code)
            cubins = self.cubins()
            replaced = cubins.get(cubin.key)
            cubins[cubin.key] = cubin
            ordered = sorted(cubins.values(), key=lambda cubin: (cubin.kernel, cubin.sm, cubin.key))
            data = msgspec.json.encode(CubinManifest(FORMAT, f"wanforge {__version__}", ordered))
            write_atomically(self.folder / MANIFEST, msgspec.json.format(data, indent=1))
            if replaced is not None and replaced.file != cubin.file:
                (self.folder / replaced.file).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def source_hash(op: str) -> str:
    """SHA-256 of an op's kernels and of every module of wanforge that they import, read but not imported."""
    sources: dict[str, bytes] = {}
    waiting = [f"wanforge.plugins.{op}.kernel"]
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


def _imported(module: str, source: bytes) -> Iterator[str]:
    """Names that may be modules of wanforge and are imported in a module."""
    with PARSING:
        tree = ast.parse(source)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name.startswith("wanforge."))
