"""Running wanforge's kernels on the machine: every launch of a function of tensors on the CPU goes through the
launcher, the stand-in driver and the PTX."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map_only

from tools.ptx.driver import DriverOfTensors, StandIn, ptx_in
from tools.ptx.faults import FaultError, UnsupportedError
from tools.ptx.machine import Modes
from tools.ptx.memory import GlobalMemory, Region
from tools.ptx.source_lines import source
from wanforge.plugins import warpgroup_attention
from wanforge.plugins.launching import call
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import CubinStore
from wanforge.plugins.launching.driver import Launcher
from wanforge.plugins.launching.launch import Launch, recording


def compile_for(run: Callable[[], object], sm: int, folder: Path) -> None:
    """Compile the kernels that a function of tensors on the meta device launches on an architecture.

    Args:
        folder: Where the cubins and their PTX are kept.
    """
    with torch.device("meta"), recording(sm) as recorded:
        run()
    compile_kernels(recorded.launches, folder, ptx=True)


class Bench:
    """A device of an architecture, whose memory is that of tensors on the CPU.

    Attributes:
        memory: The tensors that kernels may use, which every launch completes by its own arguments.
        unwritten: Memory that counts as never written by the host, by its address. Once it is freed, something else
            may lie there.
        names_source: Whether what is raised names lines of Python, for which a kernel is compiled once more.
    """

    names_source = True

    def __init__(self, sm: int, folder: Path, modes: Modes | None = None) -> None:
        self.sm, self.folder, self.memory = sm, folder, GlobalMemory()
        self.cuda = StandIn(sm, ptx_in(folder), self.memory, modes or Modes())
        self.launcher = Launcher(DriverOfTensors(self.cuda))
        self.unwritten: dict[int, StorageWeakRef] = {}

    def __call__(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of tensors on the CPU whose kernels run on this device, once they are compiled."""
        like = without_data(arguments)
        compile_for(lambda: run(*like), self.sm, self.folder)
        with self.running():
            return run(*arguments)

    def launch(self, launch: Launch) -> None:
        """Run one launch.

        Raises:
            FaultError: A thread did what none may do, or a result is not finite although all operands are.
            UnsupportedError: The machine does not know an instruction.
        """
        try:
            self._launch(launch)
        except (FaultError, UnsupportedError) as error:
            if self.names_source and error.line is not None:
                error.source = source(CubinStore(self.folder), launch.specialisation, error.line)
            raise

    def _launch(self, launch: Launch) -> None:
        for name, tensor in launch.tensors.items():
            self.add(f"{launch.kernel.name}: {name}", tensor)
        floats = [tensor for tensor in launch.tensors.values() if tensor.dtype.is_floating_point]
        before = [(region, region.data.copy(), region.written.copy()) for region in self.memory.regions]
        is_finite = all(self._is_finite(tensor) for tensor in floats)
        self.launcher(launch)
        if is_finite and not all(self._is_finite(tensor) for tensor in floats):
            for region, data, written in before:
                region.data[:], region.written[:] = data, written
            self.cuda.modes = replace(self.cuda.modes, finite=True)
            self.launcher(launch)

    def written(self, tensor: Tensor) -> Tensor:
        """Which elements of a tensor have a value."""
        region = self.memory.find(tensor.untyped_storage().data_ptr())
        assert region is not None
        written = torch.from_numpy(region.written)[: len(region.data)].view(_same_size(tensor.element_size()))
        return written.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()) != 0

    def _is_finite(self, tensor: Tensor) -> bool:
        """Whether all elements of a tensor that are written are finite."""
        finite = torch.isfinite(tensor.float())
        return bool(finite.all()) or bool((finite | ~self.written(tensor)).all())

    def add(self, name: str, tensor: Tensor, stream: int = 0) -> Region:
        """Let kernels on a stream use a tensor. Memory that `allocating` has seen counts as never written."""
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        region = self.memory.find(start)
        if start in self.unwritten and self.unwritten[start].expired():
            del self.unwritten[start]
            region = None
        if region is None or (region.start, region.end) != (start, start + size):
            region = self.memory.add(Region.at(name, start, size))
            region.stream = stream
            if start not in self.unwritten:
                region.written[:] = 1
        inside = torch.from_numpy(region.inside)[:size].view(_same_size(tensor.element_size()))
        ones = int.from_bytes(b"\1" * tensor.element_size(), "little")
        inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(ones)
        return region

    def leave_unwritten(self, tensor: Tensor) -> None:
        """Let the memory of a tensor count as never written."""
        storage = tensor.untyped_storage()
        self.unwritten[storage.data_ptr()] = StorageWeakRef(storage)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the kernels that are called with tensors on the CPU here, with the tiles of this architecture."""
        with (
            mock.patch.object(call, "interpret", self.launch),
            mock.patch.object(call, "architecture_of", return_value=self.sm),
            mock.patch.object(warpgroup_attention, "architecture_of", return_value=self.sm),
            mock.patch.dict("os.environ", {"WANFORGE_KERNELS": str(self.folder)}),
            self.allocating(),
        ):
            yield

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Note memory that `torch.empty` and `torch.empty_like` give, and fill it with a pattern."""
        with (
            mock.patch.object(torch, "empty", self._poisoning(torch.empty)),
            mock.patch.object(torch, "empty_like", self._poisoning(torch.empty_like)),
        ):
            yield

    def _poisoning(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        nothing = torch.zeros(0, dtype=torch.uint8)

        def poisoned(*given: object, **options: object) -> Tensor:
            tensor = make(*given, **options)
            if tensor.device.type == "cpu" and tensor.numel():
                storage = tensor.untyped_storage()
                nothing.clone().set_(storage).fill_(0xFF)
                self.leave_unwritten(tensor)
                stale = self.memory.find(storage.data_ptr())
                if stale is not None:
                    stale.written[:] = 0
                    stale.inside[:] = 0
            return tensor

        return poisoned


def without_data(arguments: Any) -> Any:
    """The same arguments with tensors on the meta device."""
    return tree_map_only(Tensor, _on_meta, arguments)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _same_size(size: int) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
