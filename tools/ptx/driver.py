"""A stand-in for the CUDA driver, behind wanforge's own launcher: cubins come in, and the PTX that they were assembled
from is run.

It answers the calls of `wanforge.plugins.launching.driver.Driver` as the driver does, and refuses what the driver
refuses: other numbers of threads than a kernel was compiled for, grids that are too large, and shared memory that was
not asked for or that the architecture does not have. Streams are not ordered: memory belongs to the stream that used it
first.
"""

import ctypes
import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from tools.ptx.machine import Launch, Modes
from tools.ptx.memory import GlobalMemory
from tools.ptx.syntax import Kernel, read_kernel
from tools.ptx.tensor_maps import procedure
from wanforge.plugins.launching.cubins import CubinStore
from wanforge.plugins.launching.driver import STATIC_SHARED, Driver
from wanforge.plugins.occupancy import LIMITS

LARGEST_GRID = (2**31 - 1, 65535, 65535)
SCRATCH = 2
"""How many pointers to scratch memory are the last parameters of every kernel of Triton's."""

SYMBOL_NOT_FOUND = 1
"""``CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND``."""


class Result(IntEnum):
    """The driver's answers."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_NOT_FOUND = 500


class DeviceAttribute(IntEnum):
    """The properties of a device that the launcher asks for."""

    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class FunctionAttribute(IntEnum):
    """The properties of a function that the launcher sets."""

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


@dataclass
class Function:
    """A loaded kernel.

    Attributes:
        shared_limit: The dynamic shared memory that it may use.
    """

    kernel: Kernel
    shared_limit: int = STATIC_SHARED


@dataclass
class StandIn:
    """The parts of ``cuda.bindings.driver`` that the launcher uses.

    Attributes:
        sm: The architecture of the only device.
        ptx: Finds the PTX of a cubin by its SHA-256.
        memory: The tensors that kernels may use.
        side_by_side: How many threads the machine runs at a time, about.
        only: By kernel, the blocks along the first axis of its grid that run; all where it is not named.
        launched: The name and the stream of every launch.
        modules: The kernels that were loaded, by the hash of their cubins.
    """

    sm: int
    ptx: Callable[[str], str]
    memory: GlobalMemory
    modes: Modes = field(default_factory=Modes)
    side_by_side: int = 2048
    only: Mapping[str, Collection[int]] = field(default_factory=dict)
    launched: list[tuple[str, int]] = field(default_factory=list)
    modules: dict[str, Kernel] = field(default_factory=dict)

    CUresult = Result
    CUdevice_attribute = DeviceAttribute
    CUfunction_attribute = FunctionAttribute

    def cuCtxGetDevice(self) -> tuple[Result, int]:
        return Result.CUDA_SUCCESS, 0

    def cuDeviceGetAttribute(self, attribute: DeviceAttribute, device: int) -> tuple[Result, int]:
        major, minor = divmod(self.sm, 10)
        is_major = attribute is DeviceAttribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        return Result.CUDA_SUCCESS, major if is_major else minor

    def cuDevicePrimaryCtxRetain(self, device: int | None) -> tuple[Result, str]:
        return Result.CUDA_SUCCESS, "context"

    def cuCtxPushCurrent(self, context: str) -> tuple[Result]:
        return (Result.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Result, str]:
        return Result.CUDA_SUCCESS, "context"

    def cuModuleLoadData(self, code: bytes) -> tuple[Result, Kernel | None]:
        digest = hashlib.sha256(code).hexdigest()
        try:
            self.modules[digest] = read_kernel(self.ptx(digest))
        except KeyError:
            return Result.CUDA_ERROR_INVALID_IMAGE, None
        if self.modules[digest].sm != self.sm:
            return Result.CUDA_ERROR_NO_BINARY_FOR_GPU, None
        return Result.CUDA_SUCCESS, self.modules[digest]

    def cuModuleGetFunction(self, module: Kernel, name: bytes) -> tuple[Result, Function | None]:
        if module.name != name.decode():
            return Result.CUDA_ERROR_NOT_FOUND, None
        return Result.CUDA_SUCCESS, Function(module)

    def cuFuncSetAttribute(self, function: Function, attribute: FunctionAttribute, value: int) -> tuple[Result]:
        if not 0 <= value <= LIMITS[self.sm].shared_per_program:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        function.shared_limit = value
        return (Result.CUDA_SUCCESS,)

    def cuGetProcAddress(self, name: bytes, version: int, flags: int) -> tuple[Result, int | None, int]:
        found = procedure(name, version)
        return Result.CUDA_SUCCESS, found, 0 if found else SYMBOL_NOT_FOUND

    def cuLaunchKernel(
        self,
        function: Function,
        *sizes: Any,
    ) -> tuple[Result]:
        """Run a kernel.

        Args:
            sizes: Grid and block along three axes each, shared memory in bytes, the stream, the address of pointers to
                the parameters, and no extra options.

        Raises:
            FaultError: A thread did what none may do.
            StreamError: The launch uses memory that work on another stream uses.
        """
        *axes, shared_bytes, stream, pointers, _ = sizes
        grid, block, kernel = tuple(axes[:3]), tuple(axes[3:]), function.kernel
        wrong = any(not 0 < size <= most for size, most in zip(grid, LARGEST_GRID, strict=True))
        if wrong or block != (kernel.threads, 1, 1) or shared_bytes > function.shared_limit:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        self.launched.append((kernel.name, stream))
        launch = Launch(kernel, grid, parameters_at(pointers, kernel), shared_bytes, self.memory, self.modes)
        launch.run(max(1, self.side_by_side // kernel.threads), self.only.get(kernel.name))
        self.memory.end(kernel.name, stream)
        return (Result.CUDA_SUCCESS,)


def parameters_at(pointers: int, kernel: Kernel) -> list[bytes]:
    """The bytes of each parameter, as the driver copies them: it takes as many bytes as the kernel declares from where
    each pointer points, whatever the caller meant by them.

    Raises:
        ValueError: One of the two scratch pointers, which are the last parameters, is not null, although wanforge's
            kernels need no scratch memory.
    """
    places = (ctypes.c_void_p * len(kernel.parameters)).from_address(pointers)
    found = [ctypes.string_at(place, each.size) for place, each in zip(places, kernel.parameters, strict=True)]
    if any(any(each) for each in found[-SCRATCH:]):
        raise ValueError(f"{kernel.name} is given scratch memory: {[each.hex() for each in found[-SCRATCH:]]}")
    return found


class DriverOfTensors(Driver):
    """The launcher's driver for tensors on the CPU, which stand for tensors on a device with one stream."""

    def stream(self, device: torch.device) -> int:
        return 0

    def current_device(self) -> torch.device:
        return torch.device("cpu")


def ptx_in(folder: Path) -> Callable[[str], str]:
    """A function that finds the PTX of the cubins in a folder by the hash of their code."""

    def find(digest: str) -> str:
        store = CubinStore(folder)
        by_digest = {cubin.sha256: cubin for cubin in store.cubins().values()}
        return store.ptx_path(by_digest[digest]).read_text()

    return find
