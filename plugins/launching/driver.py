"""Launch cubins through the CUDA driver. Triton is needed only when a cubin is missing and must be compiled."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import Tensor

from wanforge.configs.targets import architecture
from wanforge.errors import ResourceError
from wanforge.plugins.launching import Constant
from wanforge.plugins.launching.cubins import Cubin, CubinStore, cache_folder, folders, source_hash
from wanforge.plugins.launching.launch import Launch, Specialisation
from wanforge.requirements import install_extra, install_package

STATIC_SHARED = 48 * 1024
"""Bytes of shared memory that a program may use without raising the limit through the driver."""

SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


@dataclass(frozen=True)
class LoadedKernel:
    """A cubin that is loaded into a device's memory."""

    device: torch.device
    cubin: Cubin
    function: Any
    types: tuple[type, ...]
    """The ctypes types of the parameters and of the two scratch pointers."""


class Driver:
    """The parts of CUDA that launching needs: the driver, through cuda-python, and PyTorch's streams.

    Args:
        cuda: The module ``cuda.bindings.driver``, or a stand-in for it.
    """

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.contexts: dict[torch.device, Any] = {}

    @classmethod
    def installed(cls) -> Self:
        """The driver of this machine.

        Raises:
            ResourceError: cuda-python is not installed.
        """
        try:
            from cuda.bindings import driver
        except ImportError:
            raise ResourceError(
                f"launching kernels needs cuda-python, which is not installed; run: {install_extra('gpu')}"
            ) from None
        return cls(driver)

    def stream(self, device: torch.device) -> int:
        """PyTorch's current stream on a device."""
        return torch.cuda.current_stream(device).cuda_stream

    def current_device(self) -> torch.device:
        """The device of this thread's current context."""
        return torch.device("cuda", int(self._checked(self.cuda.cuCtxGetDevice())))

    def sm(self, device: torch.device) -> int:
        """A device's architecture: 90 for ``sm_90``."""
        attributes = self.cuda.CUdevice_attribute
        major, minor = (
            self._checked(self.cuda.cuDeviceGetAttribute(attribute, device.index))
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return architecture(major, minor)

    def load(self, device: torch.device, code: bytes, entry: str, shared_bytes: int) -> Any:
        """Load a cubin and return its function, allowed as much dynamic shared memory as it needs."""
        cuda = self.cuda
        with self._current(device):
            module = self._checked(cuda.cuModuleLoadData(code))
            function = self._checked(cuda.cuModuleGetFunction(module, entry.encode()))
            if shared_bytes > STATIC_SHARED:
                limit = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._checked(cuda.cuFuncSetAttribute(function, limit, shared_bytes))
        return function

    def launch(self, loaded: LoadedKernel, grid: tuple[int, int, int], values: Sequence[Constant], stream: int) -> None:
        """Put a kernel on a stream.

        Args:
            values: The values of the cubin's parameters in order, with tensors as addresses.
        """
        cubin = loaded.cubin
        arguments = ((*values, 0, 0), loaded.types)  # two null scratch pointers follow
        with self._current(loaded.device):
            status = self.cuda.cuLaunchKernel(
                loaded.function, *grid, cubin.threads, 1, 1, cubin.shared_bytes, stream, arguments, 0
            )
            self._checked(status)

    @contextmanager
    def _current(self, device: torch.device) -> Iterator[None]:
        """Make PyTorch's context current, because a thread that has not called CUDA has none."""
        cuda = self.cuda
        if device not in self.contexts:
            self.contexts[device] = self._checked(cuda.cuDevicePrimaryCtxRetain(device.index))
        self._checked(cuda.cuCtxPushCurrent(self.contexts[device]))
        try:
            yield
        finally:
            self._checked(cuda.cuCtxPopCurrent())

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        """Return the value of a driver call, or raise if the call failed."""
        status, *values = answer
        if status != self.cuda.CUresult.CUDA_SUCCESS:
            raise ResourceError(f"the CUDA driver refused to load or launch a kernel: {status.name}")
        return values[0] if values else None


class Launcher:
    """Launches kernels from their cubins. Each cubin is verified and loaded once per device."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.loaded: dict[tuple[torch.device, Specialisation], LoadedKernel] = {}

    def __call__(self, launch: Launch) -> None:
        """Put a launch on the current PyTorch stream of its tensors' device.

        Raises:
            ShapeError: An argument does not meet the assumptions of the compiled code.
            ResourceError: The cubin is missing or damaged, or the driver refuses it.
        """
        launch.check_arguments()
        device = next(iter(launch.tensors.values())).device
        loaded = self.load(device, launch)
        given = (launch.arguments[name] for name, _ in loaded.cubin.parameters)
        values: list[Constant] = [value.data_ptr() if isinstance(value, Tensor) else value for value in given]
        self.driver.launch(loaded, launch.grid, values, self.driver.stream(device))

    def load(self, device: torch.device, launch: Launch) -> LoadedKernel:
        """Load the cubin of a launch onto a device; only the types and constants of its arguments matter.

        Raises:
            ResourceError: The cubin is missing or damaged.
        """
        place = device, launch.specialisation
        if place not in self.loaded:
            store, cubin = find_cubin(launch)
            types = [_ctype(kind) for _, kind in cubin.parameters]
            function = self.driver.load(device, store.read(cubin), cubin.entry, cubin.shared_bytes)
            self.loaded[place] = LoadedKernel(device, cubin, function, (*types, ctypes.c_void_p, ctypes.c_void_p))
        return self.loaded[place]


def _ctype(kind: str) -> type:
    return ctypes.c_void_p if kind.startswith("*") else SCALARS[kind.removesuffix(":16")]


def find_cubin(launch: Launch) -> tuple[CubinStore, Cubin]:
    """Find the cubin for a launch, or compile it.

    Raises:
        ResourceError: There is no cubin, and Triton is not installed to compile one.
    """
    key, source = launch.specialisation.key, source_hash(launch.kernel.op)
    for store in map(CubinStore, folders()):
        cubin = store.cubins().get(key)
        if cubin is not None and cubin.source_hash == source:
            return store, cubin
    if find_spec("triton") is None:
        raise ResourceError(
            f"no cubin of {launch.kernel.name} for sm_{launch.sm} in {' or '.join(map(str, folders()))}; compile it "
            f"with: wanforge kernels --target sm_{launch.sm}, or run: {install_package('triton')}"
        )
    from wanforge.plugins.launching.compiler import compile_kernels

    (cubin,) = compile_kernels([launch], cache_folder(), jobs=1)
    return CubinStore(cache_folder()), cubin


@cache
def launcher() -> Launcher:
    """The launcher of this process."""
    return Launcher(Driver.installed())


def run(launch: Launch) -> None:
    """Launch a kernel on the GPU that holds its tensors; see `Launcher`."""
    launcher()(launch)
