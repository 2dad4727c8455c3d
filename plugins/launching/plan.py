"""Launch plans: a function's launches with each tensor as an offset from a base address, without any memory.

The function runs once on the meta device. What it does is recorded, and every tensor it creates gets a place in one
workspace, where tensors that are not needed at the same time take the same place. A plan holds no address, so it can be
repeated on any memory. At run time only additions are left, besides the calls of PyTorch between launches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wanforge.plugins.launching.launch import Launch, LibraryCall, recording
from wanforge.plugins.workspace.places import Temporary, aligned, lay_out, lay_out_like


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

    @property
    def bases(self) -> set[int]:
        """The numbers of the base addresses that it uses."""
        return {address.base for address in self.addresses.values()}


@dataclass(frozen=True)
class PlannedCall:
    """A call of PyTorch, the addresses of its arguments, and the number of the base address that its result gives."""

    call: LibraryCall
    addresses: tuple[Address, ...]
    base: int

    @property
    def bases(self) -> set[int]:
        """The numbers of the base addresses that it uses or gives."""
        return {self.base, *(address.base for address in self.addresses)}


@dataclass(frozen=True)
class LaunchPlan:
    """What a function does with tensors of given shapes.

    The base addresses are those of the tensors it was given, of the output, if it returns one, of the workspace, and of
    the results of its calls of PyTorch, in this order.

    Attributes:
        workspace_bytes: The bytes of the workspace.
        temporaries: The tensors in the workspace, in the order in which they are first used.
        output: The shape of the output.
    """

    steps: tuple[PlannedLaunch | PlannedCall, ...]
    workspace_bytes: int
    temporaries: tuple[Temporary, ...]
    output: torch.Size | None

    @property
    def temporary_bytes(self) -> int:
        """The bytes of all tensors in the workspace together. No plan for smaller shapes needs more, whereas the
        workspace may be larger for smaller shapes, if less fits in between."""
        return sum(each.size for each in self.temporaries)

    @property
    def results(self) -> list[int]:
        """The numbers of the base addresses that calls of PyTorch give."""
        return [step.base for step in self.steps if isinstance(step, PlannedCall)]

    @property
    def launches(self) -> list[PlannedLaunch]:
        return [step for step in self.steps if isinstance(step, PlannedLaunch)]


def plan(
    run: Callable[[Sequence[Tensor]], Tensor | None], given: Sequence[Tensor], sm: int, like: LaunchPlan | None = None
) -> LaunchPlan:
    """Make the launch plan of a function.

    Args:
        run: Launches kernels, calls PyTorch through `call.library` and in no other way, and returns a tensor that it
            creates, or nothing.
        given: Tensors on the meta device for it.
        sm: The architecture, such as 90.
        like: A plan of the function for larger tensors, in whose workspace this one has to fit.

    Raises:
        ShapeError: The function does not accept these tensors, or needs more memory for them than in the other plan.
    """
    with torch.device("meta"), recording(sm) as recorded:
        output = run(given)
    outputs = [] if output is None else [output]
    assert all(tensor.is_contiguous() and tensor.storage_offset() == 0 for tensor in outputs)
    starts = {_storage(tensor): Address(base, 0) for base, tensor in enumerate([*given, *outputs])}
    workspace = len(starts)
    results = [_storage(step.result) for step in recorded.steps if isinstance(step, LibraryCall)]
    assert starts.keys().isdisjoint(results)
    starts |= {result: Address(workspace + 1 + index, 0) for index, result in enumerate(results)}

    temporaries: dict[int, Temporary] = {}
    for position, step in enumerate(recorded.steps):
        for tensor in _tensors(step):
            if (storage := _storage(tensor)) not in starts:
                size = aligned(tensor.untyped_storage().nbytes())
                temporaries.setdefault(storage, Temporary(size, position, position)).last = position
    if like is None:
        lay_out(temporaries.values())
    else:
        lay_out_like(list(temporaries.values()), like.temporaries)
    starts |= {storage: Address(workspace, each.offset) for storage, each in temporaries.items()}

    def address(tensor: Tensor) -> Address:
        start = starts[_storage(tensor)]
        return Address(start.base, start.offset + int(tensor.storage_offset()) * tensor.element_size())

    steps: list[PlannedLaunch | PlannedCall] = []
    for step in recorded.steps:
        if isinstance(step, Launch):
            step.check_arguments()
            steps.append(PlannedLaunch(step, {name: address(tensor) for name, tensor in step.tensors.items()}))
        else:
            steps.append(PlannedCall(step, tuple(map(address, step.tensors)), address(step.result).base))
    return LaunchPlan(
        tuple(steps),
        max((each.end for each in temporaries.values()), default=0),
        tuple(temporaries.values()),
        None if output is None else output.shape,
    )


def _tensors(step: Launch | LibraryCall) -> Iterator[Tensor]:
    yield from step.tensors.values() if isinstance(step, Launch) else step.tensors


def _storage(tensor: Tensor) -> int:
    """Identify the memory of a tensor. The recorded steps keep their tensors alive, so no number is used again."""
    number: int = tensor.untyped_storage()._cdata
    return number
