"""Functions of tensors whose launches are planned once for each set of shapes, and repeated after that."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from wanforge.errors import ShapeError
from wanforge.plugins.launching import driver
from wanforge.plugins.launching.call import run
from wanforge.plugins.launching.driver import Launcher, LoadedLaunches
from wanforge.plugins.launching.launch import architecture_of
from wanforge.plugins.launching.plan import Address, LaunchPlan, PlannedCall, PlannedLaunch, plan
from wanforge.runtime.memory.arena import FixedTensors

Part = Callable[[list[Tensor], list[int]], None]
"""A part of a plan, run on the tensors at its base addresses. A call of PyTorch adds its result to both."""

NO_TENSORS = FixedTensors()
NOTHING = torch.empty(0)
"""Stands for a result that is not needed any more."""


class Planned:
    """A function of named tensors that repeats what it launched for the first tensors of the same shapes.

    Nothing of the tensors is remembered but their types, shapes and strides: each call has its own addresses, and a
    workspace of its own from PyTorch's allocator. Only one thread at a time may call it.

    Args:
        function: Launches kernels, and calls PyTorch through `call.library` and in no other way.
        launcher: Launches the kernels; by default the launcher of this process, and Triton's interpreter for tensors on
            the CPU.
    """

    def __init__(self, function: Callable[[Mapping[str, Tensor]], None], launcher: Launcher | None = None) -> None:
        self.function, self.launcher = function, launcher
        self.made: dict[tuple[object, ...], Repetition] = {}

    def __call__(self, tensors: Mapping[str, Tensor], fixed: FixedTensors = NO_TENSORS) -> None:
        """Call the function.

        Args:
            fixed: More of its tensors, which take less time because they are never looked at again.

        Raises:
            ShapeError: The tensors are on different devices, or do not fit the function or the kernels.
            ResourceError: A cubin is missing or damaged.
        """
        given = list(tensors.values())
        key = (fixed.signature, *tensors, *[(x.dtype, x.shape, x.stride(), x.device) for x in given])
        repetition = self.made.get(key)
        if repetition is None:
            repetition = self.made[key] = self._prepare({**tensors, **fixed})
        repetition(given, fixed)

    def _prepare(self, tensors: Mapping[str, Tensor]) -> "Repetition":
        devices = {tensor.device for tensor in tensors.values()}
        if len(devices) > 1:
            raise ShapeError(f"tensors are on {' and '.join(sorted(map(str, devices)))}; copy them to one device")
        (device,) = devices
        blanks = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors.values()]
        made = plan(
            lambda given: self.function(dict(zip(tensors, given, strict=True))), blanks, architecture_of(device)
        )
        launcher = self.launcher or (None if device.type == "cpu" else driver.launcher())
        return Repetition(made, device, launcher)


class Repetition:
    """A launch plan that is ready to run on a device.

    Args:
        launcher: Loads the kernels and launches them; None has every launch interpreted.

    Raises:
        ResourceError: A cubin is missing or damaged.
    """

    def __init__(self, made: LaunchPlan, device: torch.device, launcher: Launcher | None) -> None:
        self.plan, self.device = made, device
        self.parts: list[Part] = []
        last_uses: dict[int, int] = {}
        for is_call, grouped in groupby(made.steps, lambda step: isinstance(step, PlannedCall)):
            together = list(grouped)
            for steps in [[step] for step in together] if is_call else [together]:
                last_uses |= {base: len(self.parts) for step in steps for base in step.bases}
                self.parts.append(_part(steps, device, launcher))
        self.done = [[base for base in made.results if last_uses.get(base) == part] for part in range(len(self.parts))]

    def __call__(self, given: Sequence[Tensor], fixed: FixedTensors) -> None:
        """Repeat the plan on tensors like those that it was made for."""
        workspace = torch.empty(self.plan.workspace_bytes, dtype=torch.uint8, device=self.device)
        memory = [*given, *fixed.values(), workspace]
        bases = [*[tensor.data_ptr() for tensor in given], *fixed.addresses, workspace.data_ptr()]
        for part, done in zip(self.parts, self.done, strict=True):
            part(memory, bases)
            for base in done:
                memory[base] = NOTHING


def _part(steps: Sequence[PlannedLaunch | PlannedCall], device: torch.device, launcher: Launcher | None) -> Part:
    """A call of PyTorch, or launches that follow each other."""
    first = steps[0]
    if isinstance(first, PlannedCall):
        return partial(_call, first)
    launches = [step for step in steps if isinstance(step, PlannedLaunch)]
    if launcher is None:
        return partial(_interpret, launches)
    return partial(_put, LoadedLaunches(launcher, device, launches))


def _call(step: PlannedCall, memory: list[Tensor], bases: list[int]) -> None:
    arguments = [_at(memory, *each) for each in zip(step.addresses, step.call.tensors, strict=True)]
    result = step.call.function(*arguments).contiguous()
    memory.append(result)
    bases.append(result.data_ptr())


def _interpret(launches: Sequence[PlannedLaunch], memory: list[Tensor], bases: list[int]) -> None:
    for planned in launches:
        launch = planned.launch
        tensors = {name: _at(memory, planned.addresses[name], like) for name, like in launch.tensors.items()}
        run(launch.on(tensors))


def _put(launches: LoadedLaunches, memory: list[Tensor], bases: list[int]) -> None:
    launches.put(bases, launches.driver.stream(launches.device))


def _at(memory: Sequence[Tensor], address: Address, like: Tensor) -> Tensor:
    """The tensor at an address, with the type, shape and strides of another."""
    base = memory[address.base]
    if address.offset == 0 and (base.dtype, base.shape, base.stride()) == (like.dtype, like.shape, like.stride()):
        return base
    storage = base.untyped_storage()
    start = (base.data_ptr() - storage.data_ptr() + address.offset) // like.element_size()
    return torch.empty(0, dtype=like.dtype, device=base.device).set_(storage, start, like.shape, like.stride())
