"""Launch plans: an op's launches with each tensor as an offset from a base address, made before memory is allocated.

The op's function runs once on the meta device. Its launches are recorded, and every tensor it creates gets a place in
one workspace. At run time only additions are left: no allocation, no PyTorch tensor, no synchronisation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching import Constant
from wanforge.plugins.launching.launch import ALIGNMENT, Launch, recording

PLACE_ALIGNMENT = 256
"""Alignment in bytes of the places in the workspace, the same as that of memory allocated by CUDA."""


@dataclass(frozen=True)
class Address:
    """The place of a tensor: `offset` bytes after base address number `base`."""

    base: int
    offset: int


@dataclass(frozen=True)
class PlannedLaunch:
    """A launch and the addresses of its tensors."""

    launch: Launch
    addresses: Mapping[str, Address]

    def value(self, name: str, bases: Sequence[int]) -> Constant:
        """The value of a run-time argument: the address of a tensor, or the number itself.

        Raises:
            ShapeError: The address is not aligned as the compiled code assumes.
        """
        lies = self.addresses.get(name)
        if lies is None:
            value = self.launch.arguments[name]
            assert not isinstance(value, Tensor)
            return value
        number = bases[lies.base] + lies.offset
        if beyond := number % ALIGNMENT:
            raise ShapeError(
                f"{self.launch.kernel.name}: {name} begins {beyond} bytes after a multiple of {ALIGNMENT} bytes"
            )
        return number


@dataclass(frozen=True)
class LaunchPlan:
    """The launches of an op for inputs of given shapes.

    The base addresses are those of the inputs, the output and the workspace, in this order.
    """

    launches: tuple[PlannedLaunch, ...]
    workspace_bytes: int
    output: torch.Size


def plan(
    run: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[tuple[Sequence[int], torch.dtype]], sm: int
) -> LaunchPlan:
    """Make the launch plan of an op.

    Args:
        run: The op as a function of its inputs, which are contiguous tensors on the meta device.
        inputs: The shapes and types of the inputs.
        sm: The architecture, such as 90.

    Raises:
        ShapeError: The op does not accept these inputs.
    """
    with torch.device("meta"), recording(sm) as launches:
        given = [torch.empty(tuple(shape), dtype=dtype) for shape, dtype in inputs]
        output = run(given)
    assert output.is_contiguous()
    assert output.storage_offset() == 0
    starts = {_storage(tensor): Address(base, 0) for base, tensor in enumerate([*given, output])}
    workspace, size = len(starts), 0
    for launch in launches:
        launch.check_arguments()
        for tensor in launch.tensors.values():
            if _storage(tensor) not in starts:
                starts[_storage(tensor)] = Address(workspace, size)
                size += -(-tensor.untyped_storage().nbytes() // PLACE_ALIGNMENT) * PLACE_ALIGNMENT
    planned = []
    for launch in launches:
        addresses = {}
        for name, tensor in launch.tensors.items():
            start = starts[_storage(tensor)]
            offset = int(tensor.storage_offset()) * tensor.element_size()
            addresses[name] = Address(start.base, start.offset + offset)
        planned.append(PlannedLaunch(launch, addresses))
    return LaunchPlan(tuple(planned), size, output.shape)


def _storage(tensor: Tensor) -> int:
    """Identify the memory of a tensor. The launches keep their tensors alive, so no number is used again."""
    number: int = tensor.untyped_storage()._cdata
    return number
