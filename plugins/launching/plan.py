"""An op's launches worked out before there is any memory: where each argument will lie, behind a few base addresses.

An op's own function runs once on the meta device; what it launches is recorded, and every tensor it made becomes a
place in one workspace. At run time nothing is left but additions: no allocation, no PyTorch tensor, no synchronisation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching import Constant
from wanforge.plugins.launching.launch import ALIGNMENT, Launch, recording

PLACE_ALIGNMENT = 256
"""Bytes: what the workspace's parts are aligned to, as CUDA aligns memory."""


@dataclass(frozen=True)
class Address:
    """Where a tensor lies: `offset` bytes behind base address number `base`."""

    base: int
    offset: int


@dataclass(frozen=True)
class PlannedLaunch:
    """A launch and the places of its tensors."""

    launch: Launch
    addresses: Mapping[str, Address]

    def value(self, name: str, bases: Sequence[int]) -> Constant:
        """A run-time argument: an address, or the number itself.

        Raises:
            ShapeError: the address is not aligned as the compiled code relies on.
        """
        lies = self.addresses.get(name)
        if lies is None:
            value = self.launch.arguments[name]
            assert not isinstance(value, Tensor)
            return value
        number = bases[lies.base] + lies.offset
        if number % ALIGNMENT:
            raise ShapeError(
                f"{self.launch.kernel.name}: {name} lies at {number:#x}, which is no multiple of {ALIGNMENT}"
            )
        return number


@dataclass(frozen=True)
class LaunchPlan:
    """What an op launches for inputs of some shapes.

    Base addresses, in this order: the inputs', the output's, the workspace's.
    """

    launches: tuple[PlannedLaunch, ...]
    workspace_bytes: int
    output: torch.Size


def plan(
    run: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[tuple[Sequence[int], torch.dtype]], sm: int
) -> LaunchPlan:
    """Work out the launches of an op.

    Args:
        run: the op as a function of its inputs, contiguous tensors on the meta device.
        inputs: their shapes and types.

    Raises:
        ShapeError: the op does not take them.
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
    """What tensors that share memory have in common; the launches keep them alive, so no number comes twice."""
    number: int = tensor.untyped_storage()._cdata
    return number
