"""Launch cubins through the CUDA driver. Triton is needed only when a cubin is missing and must be compiled.

The parameters of launches are packed when their kernels are loaded. To run them, their addresses are added up in one
operation for all, tensor maps are encoded from those addresses, and the driver is given pointers to the parameters,
which it copies.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch

from wanforge.configs.targets import architecture
from wanforge.errors import ResourceError, ShapeError
from wanforge.host.library_errors import OUT_OF_MEMORY, gpu_failed, out_of_memory
from wanforge.plugins.launching import SCRATCH
from wanforge.plugins.launching.cubins import Cubin, CubinStore, cache_folder, folders, source_hash
from wanforge.plugins.launching.launch import ALIGNMENT, Launch, Specialisation
from wanforge.plugins.launching.plan import Address, PlannedLaunch
from wanforge.plugins.tensor_map.arguments import numbers_of
from wanforge.plugins.tensor_map.encoding import EncodedMaps, MapEncoder, TensorParameter
from wanforge.requirements import install_extra, install_package

STATIC_SHARED = 48 * 1024
"""Bytes of shared memory that a program may use without raising the limit through the driver."""

SCALARS = {"i32": "<i", "i64": "<q", "fp32": "<f"}
"""How `struct` packs scalars."""

WORD = 8
"""Bytes from one packed parameter to the next: the size of the largest."""

FAILED_KERNEL = re.compile(
    "ILLEGAL_ADDRESS|ILLEGAL_INSTRUCTION|MISALIGNED_ADDRESS|INVALID_ADDRESS_SPACE|INVALID_PC|HARDWARE_STACK_ERROR|"
    "LAUNCH_FAILED|LAUNCH_TIMEOUT|ASSERT|ECC_UNCORRECTABLE|CONTAINED"
)
"""The driver's errors that a kernel causes while it runs. They come back from whatever is called next."""


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel in a device's memory.

    Attributes:
        parameters: Name and type of each parameter, in order, without the scratch pointers.
        threads, shared_bytes: What one program has.
    """

    function: Any
    parameters: tuple[tuple[str, str], ...]
    threads: int
    shared_bytes: int


class Driver:
    """The parts of CUDA that launching needs: the driver, through cuda-python, and PyTorch's streams.

    Args:
        cuda: The module ``cuda.bindings.driver``, or a stand-in for it.
    """

    def __init__(self, cuda: Any) -> None:
        self.cuda, self.encoder = cuda, MapEncoder(cuda)
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
        with self.current(device):
            module = self._checked(cuda.cuModuleLoadData(code))
            function = self._checked(cuda.cuModuleGetFunction(module, entry.encode()))
            if shared_bytes > STATIC_SHARED:
                limit = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._checked(cuda.cuFuncSetAttribute(function, limit, shared_bytes))
        return function

    def launch(self, kernel: LoadedKernel, grid: tuple[int, int, int], parameters: int, stream: int) -> None:
        """Put a kernel on a stream of the device whose context is current.

        Args:
            parameters: The address of pointers to the parameters and to the null scratch pointers after them.
        """
        columns, rows, layers = grid
        answer = self.cuda.cuLaunchKernel(
            kernel.function, columns, rows, layers, kernel.threads, 1, 1, kernel.shared_bytes, stream, parameters, 0
        )
        if answer[0]:
            self._checked(answer)

    @contextmanager
    def current(self, device: torch.device) -> Iterator[None]:
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
        """Return the value of a driver call.

        Raises:
            GpuError: A kernel has failed, this one or one that was launched before.
            ResourceError: Memory ran out, or the driver refuses something.
        """
        if answer[0] != self.cuda.CUresult.CUDA_SUCCESS:
            name = answer[0].name
            if OUT_OF_MEMORY.search(name):
                raise out_of_memory(name)
            if FAILED_KERNEL.search(name):
                raise gpu_failed(name)
            raise ResourceError(f"the CUDA driver refused to load or launch a kernel: {name}")
        return answer[1] if len(answer) > 1 else None


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
        tensors = launch.tensors
        device = next(iter(tensors.values())).device
        alone = PlannedLaunch(launch, {name: Address(base, 0) for base, name in enumerate(tensors)})
        addresses = [tensor.data_ptr() for tensor in tensors.values()]
        LoadedLaunches(self, device, [alone]).put(addresses, self.driver.stream(device))

    def load(self, device: torch.device, launch: Launch) -> LoadedKernel:
        """Load the cubin of a launch onto a device; only the types and constants of its arguments matter.

        Raises:
            ResourceError: The cubin is missing or damaged.
        """
        place = device, launch.specialisation
        if place not in self.loaded:
            store, cubin = find_cubin(launch)
            function = self.driver.load(device, store.read(cubin), cubin.entry, cubin.shared_bytes)
            self.loaded[place] = LoadedKernel(function, cubin.parameters, cubin.threads, cubin.shared_bytes)
        return self.loaded[place]


class LoadedLaunches:
    """Launches that follow each other, with their kernels loaded and all parameters packed but the addresses.

    The packed parameters are written at every run, so only one thread at a time may use this.

    Raises:
        ResourceError: A cubin is missing or damaged.
    """

    def __init__(self, launcher: Launcher, device: torch.device, launches: Sequence[PlannedLaunch]) -> None:
        self.driver, self.device = launcher.driver, device
        kernels = [launcher.load(device, planned.launch) for planned in launches]
        starts = list(accumulate((len(kernel.parameters) + SCRATCH for kernel in kernels), initial=0))
        self._parameters = np.zeros(starts[-1], np.uint64)
        self._pointers = self._parameters.ctypes.data + WORD * np.arange(starts[-1], dtype=np.uint64)
        self._launches = [
            (kernel, planned.launch.grid, self._pointers.ctypes.data + WORD * start)
            for kernel, planned, start in zip(kernels, launches, starts, strict=False)
        ]
        self._tensors: list[TensorParameter] = []
        places: list[tuple[int, int, int]] = []
        for planned, kernel, start in zip(launches, kernels, starts, strict=False):
            values = {**planned.launch.arguments, **numbers_of(planned.launch.arguments)}
            for position, (name, kind) in enumerate(kernel.parameters, start):
                address = planned.addresses.get(name)
                if address is not None:
                    self._tensors.append(TensorParameter(planned.launch.kernel.name, name, values[name]))
                    places.append((position, address.base, address.offset))
                else:
                    scalar = SCALARS[kind.removesuffix(":16")]
                    struct.pack_into(scalar, self._parameters.data, WORD * position, values[name])
        # NumPy converts indices of any other type, and is slower where they do not lie side by side.
        self._positions, self._bases, offsets = np.array(places, np.intp).T.copy()
        self._offsets = offsets.astype(np.uint64)
        self._maps = EncodedMaps(self.driver.encoder, self._tensors)
        self._pointers[self._positions[self._maps.positions]] = self._maps.places

    def put(self, bases: Sequence[int], stream: int) -> None:
        """Put the launches on a stream.

        Args:
            bases: The base addresses of the launch plan.

        Raises:
            ShapeError: An address is not aligned as the compiled code assumes.
            ResourceError: The driver refuses a launch or a tensor map.
        """
        addresses = np.array(bases, np.uint64)[self._bases] + self._offsets
        if np.bitwise_or.reduce(addresses) % ALIGNMENT:
            beyond = addresses % ALIGNMENT
            kernel, name, _ = self._tensors[beyond.argmax()]
            raise ShapeError(f"{kernel}: {name} begins {beyond.max()} bytes after a multiple of {ALIGNMENT} bytes")
        self._parameters[self._positions] = addresses
        with self.driver.current(self.device):
            self._maps.put(addresses)
            for kernel, grid, parameters in self._launches:
                self.driver.launch(kernel, grid, parameters, stream)


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
