"""Compiled kernels: the folder that holds them, and launching them through the CUDA driver.

Nothing here needs Triton or a compiler. A kernel of which there is no cubin is compiled where Triton is installed.
"""

import ast
import ctypes
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

import wanforge
from wanforge import __version__
from wanforge.configs.schema import Record
from wanforge.errors import ResourceError
from wanforge.plugins.launching.launch import PARSING, Constant, Launch, Specialisation
from wanforge.whole_file import write_atomically

MANIFEST = "manifest.json"
FORMAT: Literal[1] = 1
PACKAGE = Path(wanforge.__file__).parent

STATIC_SHARED = 48 * 1024
"""Bytes of shared memory a program may have without asking the driver."""

SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


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


class Manifest(Record, frozen=True):
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


class Store:
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
            manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
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
            data = msgspec.json.encode(Manifest(FORMAT, f"wanforge {__version__}", ordered))
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
    waiting = [f"{wanforge.__name__}.plugins.{op}.kernel"]
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
        yield from (name for name in names if name.startswith(f"{wanforge.__name__}."))


def find(launch: Launch) -> tuple[Store, Cubin]:
    """The cubin for a launch, compiled if it must be and can be.

    Raises:
        ResourceError: there is none, and no Triton to make it.
    """
    key, source = launch.specialisation.key, source_hash(launch.kernel.op)
    for store in map(Store, folders()):
        cubin = store.cubins().get(key)
        if cubin is not None and cubin.source_hash == source:
            return store, cubin
    if find_spec("triton") is None:
        raise ResourceError(
            f"no cubin of {launch.kernel.name} for sm_{launch.sm} in {' or '.join(map(str, folders()))}; make it with: "
            f"wanforge kernels --target sm_{launch.sm}, or pip install triton"
        )
    from wanforge.plugins.launching.compiler import compile_kernels

    (cubin,) = compile_kernels([launch], cache_folder(), jobs=1)
    return Store(cache_folder()), cubin


class Driver:
    """What launching takes of CUDA: the driver through cuda-python, and PyTorch's streams.

    Raises:
        ResourceError: cuda-python is not installed.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError:
            raise ResourceError(
                "launching kernels needs cuda-python, which is not installed; run: pip install 'wanforge[gpu]'"
            ) from None
        self.cuda = driver
        self.contexts: dict[torch.device, Any] = {}

    def stream(self, device: torch.device) -> int:
        """PyTorch's current stream."""
        return torch.cuda.current_stream(device).cuda_stream

    def current_device(self) -> torch.device:
        """The device of the context that is current in this thread."""
        return torch.device("cuda", int(self._checked(self.cuda.cuCtxGetDevice())))

    def sm(self, device: torch.device) -> int:
        """A device's architecture, as in ``sm_90``."""
        attributes = self.cuda.CUdevice_attribute
        major, minor = (
            self._checked(self.cuda.cuDeviceGetAttribute(attribute, device.index))
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return 10 * major + minor

    def load(self, device: torch.device, code: bytes, entry: str, shared_bytes: int) -> Any:
        """A function of a cubin, allowed as much dynamic shared memory as it needs."""
        cuda = self.cuda
        with self._current(device):
            module = self._checked(cuda.cuModuleLoadData(code))
            function = self._checked(cuda.cuModuleGetFunction(module, entry.encode()))
            if shared_bytes > STATIC_SHARED:
                limit = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._checked(cuda.cuFuncSetAttribute(function, limit, shared_bytes))
        return function

    def launch(
        self,
        device: torch.device,
        function: Any,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        values: Sequence[Constant],
        types: Sequence[type],
    ) -> None:
        """Put a kernel on a stream."""
        arguments = (tuple(values), tuple(types))
        with self._current(device):
            self._checked(self.cuda.cuLaunchKernel(function, *grid, threads, 1, 1, shared_bytes, stream, arguments, 0))

    @contextmanager
    def _current(self, device: torch.device) -> Iterator[None]:
        """Make the context that PyTorch uses the current one: a thread that has not called CUDA has none."""
        cuda = self.cuda
        if device not in self.contexts:
            self.contexts[device] = self._checked(cuda.cuDevicePrimaryCtxRetain(device.index))
        self._checked(cuda.cuCtxPushCurrent(self.contexts[device]))
        try:
            yield
        finally:
            self._checked(cuda.cuCtxPopCurrent())

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        """The value of a driver call."""
        status, *values = answer
        if status != self.cuda.CUresult.CUDA_SUCCESS:
            raise ResourceError(f"the CUDA driver refused to load or launch a kernel: {status.name}")
        return values[0] if values else None


@dataclass(frozen=True)
class Loaded:
    """A cubin in a device's memory."""

    device: torch.device
    cubin: Cubin
    function: Any
    types: tuple[type, ...]
    """Of the parameters and the two scratch pointers."""


class Launcher:
    """Launches kernels from their cubins; each is verified and loaded once per device."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.loaded: dict[tuple[torch.device, Specialisation], Loaded] = {}

    def __call__(self, launch: Launch) -> None:
        """Put a launch on PyTorch's current stream of its tensors' device.

        Raises:
            ShapeError: an argument does not hold what the compiled code relies on.
            ResourceError: there is no cubin, it is damaged, or the driver refuses it.
        """
        launch.check_arguments()
        device = next(value.device for value in launch.arguments.values() if isinstance(value, Tensor))
        loaded = self.load(device, launch)
        given = (launch.arguments[name] for name, _ in loaded.cubin.parameters)
        values: list[Constant] = [value.data_ptr() if isinstance(value, Tensor) else value for value in given]
        self.put(loaded, launch.grid, values, self.driver.stream(device))

    def load(self, device: torch.device, launch: Launch) -> Loaded:
        """The cubin of a launch, in a device's memory; only its types and constants are looked at.

        Raises:
            ResourceError: there is none, or it is damaged.
        """
        place = device, launch.specialisation
        if place not in self.loaded:
            store, cubin = find(launch)
            types = [_ctype(kind) for _, kind in cubin.parameters]
            function = self.driver.load(device, store.read(cubin), cubin.entry, cubin.shared_bytes)
            self.loaded[place] = Loaded(device, cubin, function, (*types, ctypes.c_void_p, ctypes.c_void_p))
        return self.loaded[place]

    def put(self, loaded: Loaded, grid: tuple[int, int, int], values: Sequence[Constant], stream: int) -> None:
        """Put a kernel on a stream, with the cubin's parameters in their order, pointers as addresses."""
        cubin = loaded.cubin
        self.driver.launch(
            loaded.device,
            loaded.function,
            grid,
            cubin.threads,
            cubin.shared_bytes,
            stream,
            [*values, 0, 0],
            loaded.types,
        )


def _ctype(kind: str) -> type:
    return ctypes.c_void_p if kind.startswith("*") else SCALARS[kind.removesuffix(":16")]


@cache
def launcher() -> Launcher:
    """The one of this process."""
    return Launcher(Driver())


def run(launch: Launch) -> None:
    """Launch a kernel on the GPU of its tensors; see `Launcher`."""
    launcher()(launch)
