"""Kernel launches: a kernel's signature, its arguments, and the specialisation that a cubin is compiled for; and what
is recorded of a function that makes them.

Nothing here runs a kernel or imports Triton; see `call`, `interpreter` and `driver`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from wanforge.configs.targets import architecture
from wanforge.configs.tiles import Tile, load_tiles
from wanforge.errors import ResourceError, ShapeError
from wanforge.plugins.launching import Constant
from wanforge.plugins.launching.grid import evaluate
from wanforge.plugins.tensor_map.arguments import tensors_of, with_tensors
from wanforge.plugins.tensor_map.parameters import kind_of
from wanforge.plugins.tensor_map.tensor_map import TensorMap

ALIGNMENT = 16
"""Every pointer, in bytes, and every integer declared with ``:16`` is a multiple of this."""

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

INT32 = torch.iinfo(torch.int32)

INTERPRETED_SM = 80
"""The architecture whose tiles the interpreter uses."""


@dataclass(frozen=True)
class KernelSignature:
    """A Triton function, identified by name, with what is needed to launch it.

    Attributes:
        op: The folder in `plugins` that holds it.
        function: Its name in that folder's ``kernel.py``.
        grid: Number of programs along each axis, as rules over the names of scalars and constants; see `grid.evaluate`.
        scalars: Type of each parameter that is neither a tensor nor a constant: ``i32``, ``i64`` or ``fp32``, followed
            by ``:16`` if its values are multiples of 16.
    """

    op: str
    function: str
    grid: tuple[str, ...]
    scalars: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op}.{self.function}"


@dataclass(frozen=True)
class Specialisation:
    """What a cubin is compiled for. Its `key` and the kernel's source together identify the cubin."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    """Type of each run-time parameter, such as ``*bf16``, ``i32``, ``i32:16``, ``fp32`` or a tensor map's."""
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int
    num_stages: int
    sm: int

    @property
    def key(self) -> str:
        data = json.dumps([self.kernel, self.types, self.constants, self.num_warps, self.num_stages, self.sm])
        return hashlib.sha256(data.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, for one architecture."""

    kernel: KernelSignature
    arguments: Mapping[str, Tensor | TensorMap | Constant]
    num_warps: int
    num_stages: int
    sm: int

    @property
    def specialisation(self) -> Specialisation:
        types, constants = {}, {}
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                types[name] = POINTERS[value.dtype]
            elif isinstance(value, TensorMap):
                types[name] = kind_of(POINTERS[value.tensor.dtype], value.tensor.element_size(), value.box)
            elif name in self.kernel.scalars and value is not None:
                types[name] = self.kernel.scalars[name]
            else:
                constants[name] = value
        return Specialisation(
            self.kernel.name,
            tuple(sorted(types.items())),
            tuple(sorted(constants.items())),
            self.num_warps,
            self.num_stages,
            self.sm,
        )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of programs along each of the three axes."""
        names = {name: value for name, value in self.arguments.items() if isinstance(value, int)}
        sizes = [evaluate(axis, names) for axis in self.kernel.grid]
        x, y, z = (*sizes, 1, 1, 1)[:3]
        return x, y, z

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arguments that are tensors, and the tensors of those that are tensor maps."""
        return tensors_of(self.arguments)

    def on(self, tensors: Mapping[str, Tensor]) -> Self:
        """The launch with other tensors in the place of its own."""
        return replace(self, arguments=with_tensors(self.arguments, tensors))

    def check_arguments(self) -> None:
        """Refuse arguments that do not meet the assumptions of the compiled code.

        Raises:
            ShapeError: The tensors are on different devices, or an argument is not aligned or does not fit its type.
        """
        devices = {tensor.device for tensor in self.tensors.values()}
        if len(devices) > 1:
            raise ShapeError(f"{self.kernel.name}: tensors are on {' and '.join(sorted(map(str, devices)))}")
        for name, tensor in self.tensors.items():
            if beyond := tensor.data_ptr() % ALIGNMENT:
                raise ShapeError(
                    f"{self.kernel.name}: {name} begins {beyond} bytes after a multiple of {ALIGNMENT} bytes; give a "
                    "copy of it"
                )
        for name, kind in self.kernel.scalars.items():
            value = self.arguments.get(name)
            if isinstance(value, int) and kind.endswith(":16") and value % ALIGNMENT:
                raise ShapeError(f"{self.kernel.name}: {name} is {value}, which is not a multiple of {ALIGNMENT}")
            if isinstance(value, int) and kind.startswith("i32") and not INT32.min <= value <= INT32.max:
                raise ShapeError(f"{self.kernel.name}: {name} is {value}, which does not fit a 32-bit integer")


@dataclass(frozen=True)
class LibraryCall:
    """A call of PyTorch between launches, and its result."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    result: Tensor


@dataclass(frozen=True)
class Recording:
    """What a function does with tensors on the meta device, in order."""

    steps: list[Launch | LibraryCall] = field(default_factory=list)

    @property
    def launches(self) -> list[Launch]:
        return [step for step in self.steps if isinstance(step, Launch)]


_target: ContextVar[int | None] = ContextVar("target", default=None)
_recorded: ContextVar[Recording] = ContextVar("recorded")


@contextmanager
def recording(sm: int) -> Iterator[Recording]:
    """Collect what is launched with tensors on the meta device, using the tiles of an architecture."""
    recorded = Recording()
    tokens = _target.set(sm), _recorded.set(recorded)
    try:
        yield recorded
    finally:
        _target.reset(tokens[0])
        _recorded.reset(tokens[1])


def record(step: Launch | LibraryCall) -> None:
    """Add a launch or a call of PyTorch to the innermost `recording`."""
    _recorded.get().steps.append(step)


def architecture_of(device: torch.device) -> int:
    """The architecture that a launch on a device is for: 90 for ``sm_90``."""
    if device.type == "cuda":
        return architecture(*torch.cuda.get_device_capability(device))
    return _target.get() or INTERPRETED_SM


@lru_cache
def tile_for(kernel: str, sm: int) -> Tile:
    """The tile table's row for a kernel on an architecture.

    Raises:
        ResourceError: The table has no tiles for the kernel, or none for this architecture.
    """
    rows = load_tiles().get(kernel)
    if rows is None:
        raise ResourceError(f"no tiles for {kernel} in configs/tiles.toml; give it a row for each architecture")
    for row in rows:
        if sm in row.sms:
            return row
    known = sorted({sm for row in rows for sm in row.sms})
    raise ResourceError(f"no tiles for {kernel} on sm_{sm}; there are some for {', '.join(f'sm_{s}' for s in known)}")
