"""One way to launch a kernel, on whatever the tensors live: interpreted on the CPU, from its cubin on a GPU, and
recorded on the meta device, which is how the ahead-of-time compiler learns what a model needs.

Nothing here imports Triton until a kernel is interpreted or compiled: a deployed image has cubins only.
"""

import ast
import hashlib
import json
import operator
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from wanforge.configs.schema import Tile, load_tiles
from wanforge.errors import ResourceError, ShapeError

ALIGNMENT = 16
"""Bytes: every pointer is a multiple of it, and so is every integer declared with ``:16``."""

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

INT32 = torch.iinfo(torch.int32)

INTERPRETED_SM = 80
"""Whose tiles the interpreter takes."""

# Triton reads it once, when it is imported, whoever imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

Constant = int | float | bool | str | None


@dataclass(frozen=True)
class Kernel:
    """A Triton function, known by name so that it can be launched where there is no Triton.

    Attributes:
        op: its folder in `plugins`.
        function: its name in that folder's ``kernel.py``.
        grid: number of programs along each axis, over the names of scalars and constants; ``cdiv`` rounds up.
        scalars: type of each parameter that is neither a tensor nor a constant: ``i32``, ``i64`` or ``fp32``, with
            ``:16`` where it is a multiple of 16.
    """

    op: str
    function: str
    grid: tuple[str, ...]
    scalars: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op}.{self.function}"

    def __call__(self, **arguments: Tensor | Constant) -> None:
        """Launch on the device of the tensors.

        Args:
            arguments: every parameter by name, but for what the tile table gives. An absent tensor is None.

        Raises:
            ShapeError: a tensor or a scalar is not what its type says, see `Launch.check_arguments`.
            ResourceError: there is neither a cubin for this GPU nor a Triton to make one.
        """
        tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
        sm = target_sm(tensor.device)
        tile = tile_for(self.name, sm)
        launch = Launch(self, {**tile.blocks, **arguments}, tile.num_warps, tile.num_stages, sm)
        match tensor.device.type:
            case "meta":
                _recorded.get().append(launch)
            case "cpu":
                launch.interpret()
            case _:
                cubins = import_module("wanforge.plugins.launching.cubins")
                cubins.run(launch)


@dataclass(frozen=True)
class Specialisation:
    """What a cubin is compiled for. Its `key` names the cubin, together with the kernel's source."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    """Type of each run-time parameter: ``*bf16``, ``i32``, ``i32:16``, ``fp32``."""
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
    """A kernel with its arguments."""

    kernel: Kernel
    arguments: Mapping[str, Tensor | Constant]
    num_warps: int
    num_stages: int
    sm: int

    @property
    def specialisation(self) -> Specialisation:
        types, constants = {}, {}
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                types[name] = POINTERS[value.dtype]
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
        names = {name: value for name, value in self.arguments.items() if isinstance(value, int)}
        sizes = [evaluate(axis, names) for axis in self.kernel.grid]
        x, y, z = (*sizes, 1, 1, 1)[:3]
        return x, y, z

    def check_arguments(self) -> None:
        """Refuse what the compiled code relies on and does not hold.

        Raises:
            ShapeError: a tensor lies elsewhere than the first, or an argument is not aligned or does not fit its type.
        """
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}
        devices = {tensor.device for tensor in tensors.values()}
        if len(devices) > 1:
            raise ShapeError(f"{self.kernel.name}: tensors on {' and '.join(sorted(map(str, devices)))}")
        for name, tensor in tensors.items():
            self._check_multiple(name, tensor.data_ptr())
        for name, kind in self.kernel.scalars.items():
            value = self.arguments.get(name)
            if isinstance(value, int) and kind.endswith(":16"):
                self._check_multiple(name, value)
            if isinstance(value, int) and kind.startswith("i32") and not INT32.min <= value <= INT32.max:
                raise ShapeError(f"{self.kernel.name}: {name} is {value}, which is no 32-bit integer")

    def _check_multiple(self, name: str, number: int) -> None:
        if number % ALIGNMENT:
            raise ShapeError(f"{self.kernel.name}: {name} is {number}, which is no multiple of {ALIGNMENT}")

    def interpret(self) -> None:
        """Run in Triton's interpreter, on the CPU."""
        self.check_arguments()
        load_function(self.kernel.op, self.kernel.function)[self.grid](**self.arguments)


def load_function(op: str, function: str) -> Any:
    """The Triton function itself; interpreted, unless there is a GPU or TRITON_INTERPRET says otherwise."""
    try:
        module = import_module(f"wanforge.plugins.{op}.kernel")
    except ModuleNotFoundError as missing:
        raise ResourceError(
            f"running the kernel {op}.{function} without its cubin needs {missing.name}; pip install triton"
        ) from None
    return getattr(module, function)


_target: ContextVar[int | None] = ContextVar("target", default=None)
_recorded: ContextVar[list[Launch]] = ContextVar("recorded")


@contextmanager
def recording(sm: int) -> Iterator[list[Launch]]:
    """Collect what meta tensors launch, with the tiles of an architecture."""
    launches: list[Launch] = []
    tokens = _target.set(sm), _recorded.set(launches)
    try:
        yield launches
    finally:
        _target.reset(tokens[0])
        _recorded.reset(tokens[1])


def target_sm(device: torch.device) -> int:
    """The architecture that a launch is for, as in ``sm_90``."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return _target.get() or INTERPRETED_SM


@lru_cache
def tile_for(kernel: str, sm: int) -> Tile:
    """The tile table's row for a kernel on an architecture.

    Raises:
        ResourceError: the kernel is not made for it.
    """
    rows = load_tiles()[kernel]
    for row in rows:
        if sm in row.sms:
            return row
    known = sorted({sm for row in rows for sm in row.sms})
    raise ResourceError(f"no tiles of {kernel} for sm_{sm}; there are some for {', '.join(f'sm_{s}' for s in known)}")


_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def evaluate(expression: str, names: Mapping[str, int]) -> int:
    """The value of a grid rule: integers, names, + - * // and ``cdiv(a, b)``."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name):
                return names[name]
            case ast.BinOp(left=left, op=op, right=right):
                return _OPERATIONS[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id="cdiv"), args=[a, b]):
                return -(-value(a) // value(b))
        raise ValueError(f"a grid rule cannot hold {ast.unparse(node)!r}")

    return value(_parsed(expression))


PARSING = Lock()
"""Python 3.11 counts the depth of what it parses for all threads together, and stops when the count is off."""


@lru_cache
def _parsed(expression: str) -> ast.expr:
    with PARSING:
        return ast.parse(expression, mode="eval").body
