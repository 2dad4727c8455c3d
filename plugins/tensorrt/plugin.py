"""Ops as TensorRT plugins: TensorRT's plugin interface, implemented for any `PluginOp` and for both flavours.

An op declares in `plugins/<op>/plugin.py` which types and shapes it accepts and what it launches. The ONNX parser finds
it by the name, ``plugin_namespace`` and ``plugin_version`` of a node; see `onnx_body.PLUGIN`.

The launch plan, with the places of temporaries in the workspace, is made when shapes change; `enqueue` adds
addresses and puts kernels on the given stream. Two things are unverified because no GPU with TensorRT was available:
that the flavours call `on_shape_change` before they capture `enqueue` into a CUDA graph, and the cost of a call.
Parsing, building and the launches themselves are tested.

PyTorch is imported only when a launch plan is made, because parsing does not need it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np

from wanforge.configs.tiles import tiled_architectures
from wanforge.errors import ResourceError, WanforgeError
from wanforge.plugins.tensorrt.library import Flavour, Library

if TYPE_CHECKING:
    from torch import Tensor

    from wanforge.plugins.launching.driver import Launcher, LoadedLaunches
    from wanforge.plugins.launching.plan import LaunchPlan

NAMESPACE, VERSION = "wanforge", "1"
OPS = ("w8a8_linear", "sparse_linear_attention")
"""The folders of the single ops that have a plugin."""
BLOCK = "denoiser_block"
"""The folder of the op that is a whole block."""
ALL_OPS = (*OPS, BLOCK)

TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32", "INT64": "int64"}
"""PyTorch's names of element types by TensorRT's."""
COMPUTE = ("float32", "float16", "bfloat16")

DYNAMIC = -1
"""A dimension that TensorRT does not know yet."""

Expression = TypeVar("Expression")
Shape = tuple[int, ...]


class PluginOp(ABC):
    """What TensorRT must know about an op. A subclass is a frozen dataclass of the node's attributes."""

    name: ClassVar[str]
    """Name of the node in ONNX."""
    inputs: tuple[str, ...]

    @abstractmethod
    def types(self, compute: str) -> tuple[tuple[str, ...], ...]:
        """The types that each input may have if the first input, and therefore the output, has type `compute`."""

    @abstractmethod
    def check_shapes(self, shapes: Sequence[Shape]) -> None:
        """Check the shapes of the inputs, in which a dimension may be `DYNAMIC`.

        Raises:
            ShapeError: The op does not accept the shapes.
        """

    @abstractmethod
    def output(self, shapes: Sequence[Sequence[Expression]]) -> list[Expression]:
        """The output's shape, built from the inputs' dimensions, which may be numbers or symbolic expressions."""

    @abstractmethod
    def run(self, inputs: Sequence["Tensor"]) -> "Tensor":
        """Launch the op's kernels and return the output."""

    def on(self, sm: int) -> Self:
        """The variant of the op that runs on an architecture."""
        return self

    def up_to(self, shapes: Sequence[Shape]) -> Self:
        """The op in an engine whose inputs have at most these shapes."""
        return self

    def plan(self, inputs: Sequence[tuple[Shape, str]], sm: int, like: "LaunchPlan | None" = None) -> "LaunchPlan":
        """The op's launch plan for inputs of given shapes and types.

        Args:
            like: A plan for larger inputs, in whose workspace this one has to fit.
        """
        import torch

        from wanforge.plugins.launching.plan import plan

        blanks = [torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for shape, dtype in inputs]
        return plan(self.on(sm).run, blanks, sm, like)

    def workspace_bytes(self, inputs: Sequence[tuple[Shape, str]]) -> int:
        """A workspace that is enough for these inputs and smaller ones, on every architecture that an engine serves."""
        distinct = {self.on(sm): sm for sm in tiled_architectures()}
        return max(op.plan(inputs, sm).temporary_bytes for op, sm in distinct.items())

    def refusal(self, position: int, found: Sequence[str]) -> str:
        """Why the tensor at `position` (inputs, then the output) has an unsupported type, or an empty string.

        Args:
            position: The index of the tensor.
            found: The types of the tensors up to and including this one.
        """
        what = [*self.inputs, "the output"][position]
        wanted = COMPUTE if position == 0 else (*self.types(found[0]), (found[0],))[position]
        if found[position] not in wanted:
            return f"{self.name}: {what} is {found[position]}, but must be {' or '.join(wanted)}"
        return ""


def find_op(folder: str) -> type[PluginOp]:
    """The plugin op of a folder of `plugins`."""
    found: type[PluginOp] = import_module(f"wanforge.plugins.{folder}.plugin").OP
    return found


class Preparation:
    """The launches of one plugin in one execution context, loaded once per set of input shapes and types."""

    def __init__(self, op: PluginOp) -> None:
        self.op = op
        self.made: dict[tuple[tuple[Shape, str], ...], LoadedLaunches] = {}

    def ready(self, inputs: tuple[tuple[Shape, str], ...], launcher: "Launcher") -> "LoadedLaunches":
        """The loaded launches for these inputs on the current GPU."""
        if inputs not in self.made:
            from wanforge.plugins.launching.driver import LoadedLaunches

            device = launcher.driver.current_device()
            plan = self.op.plan(inputs, launcher.driver.sm(device))
            self.made[inputs] = LoadedLaunches(launcher, device, plan.launches)
        return self.made[inputs]


@cache
def array_of(value: int | str) -> Any:
    """An attribute as an array. It is cached because TensorRT keeps only a pointer to its memory."""
    if isinstance(value, int):
        return np.array([value], dtype=np.int32)
    return np.array(list(value.encode()), dtype=np.int8)


class Attributes:
    """Conversion of a node's attributes to and from TensorRT's plugin fields."""

    def __init__(self, trt: Any, op: type[PluginOp]) -> None:
        self.trt = trt
        self.kinds = {each.name: each.type for each in fields(op)}  # type: ignore[arg-type]

    def names(self) -> Any:
        """The fields that TensorRT should look for in a node."""
        return self._collection({name: 0 if kind in (int, "int") else "" for name, kind in self.kinds.items()})

    def of(self, op: PluginOp) -> Any:
        """The fields that are stored in an engine."""
        return self._collection(asdict(op))  # type: ignore[call-overload]

    def _collection(self, values: Mapping[str, int | str]) -> Any:
        kinds = self.trt.PluginFieldType
        found = []
        for name, value in values.items():
            kind = kinds.INT32 if isinstance(value, int) else kinds.CHAR
            found.append(self.trt.PluginField(name, array_of(value), kind))
        return self.trt.PluginFieldCollection(found)

    def read(self, collection: Any) -> dict[str, int | str]:
        """The attributes in the fields of a node or an engine; unknown fields are ignored."""
        found: dict[str, int | str] = {}
        for each in collection:
            if each.name in self.kinds:
                is_number = self.kinds[each.name] in (int, "int")
                data = np.asarray(each.data)
                found[each.name] = int(data[0]) if is_number else data.tobytes().rstrip(b"\0").decode()
        return found


@dataclass(eq=False)
class Account:
    """A record of the plugins in a build.

    Attributes:
        refusals: What was refused and why, because TensorRT's own message does not say.
        calls: Each op with the largest inputs for which TensorRT asked its workspace size.
    """

    refusals: list[str] = field(default_factory=list)
    calls: dict[tuple[PluginOp, tuple[tuple[Shape, str], ...]], None] = field(default_factory=dict)


@contextmanager
def noted(account: Account, op: PluginOp) -> Iterator[None]:
    """Record an error in the account, because TensorRT does not pass it on."""
    try:
        yield
    except WanforgeError as error:
        account.refusals.append(f"{op.name}: {error}")
        raise


def plugin_class(trt: Any, accounts: Sequence[Account]) -> type:
    """Define the class of all plugins on one flavour's module. They use the last account that there is at the time."""

    def type_of(desc: Any) -> str:
        return TYPES.get(desc.type.name, desc.type.name.lower())

    def shape_of(dims: Any) -> Shape:
        return tuple(dims)

    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc]
        def __init__(self, op: PluginOp) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = op.name, VERSION, NAMESPACE
            self.num_outputs = 1
            self.op = op
            self.preparation = Preparation(op)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.op)

        # Building

        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            return [types[0]]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            result = self.op.output([list(dims) for dims in inputs])
            dims = trt.DimsExprs(len(result))
            for axis, expression in enumerate(result):
                dims[axis] = expression
            return [dims]

        def supports_format_combination(self, position: int, described: Sequence[Any], num_inputs: int) -> bool:
            found = [type_of(each.desc) for each in described[: position + 1]]
            refusal = self.op.refusal(position, found)
            if refusal:
                accounts[-1].refusals.append(refusal)
            return not refusal and described[position].desc.format == trt.TensorFormat.LINEAR

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            with noted(accounts[-1], self.op):
                self.op.check_shapes([shape_of(each.desc.dims) for each in inputs])
                self.op = self.op.up_to([shape_of(each.max) for each in inputs])

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            largest = tuple((shape_of(each.max), type_of(each.desc)) for each in inputs)
            accounts[-1].calls[self.op, largest] = None
            with noted(accounts[-1], self.op):
                return self.op.workspace_bytes(largest)

        # Running

        def get_fields_to_serialize(self) -> Any:
            self.kept = Attributes(trt, type(self.op)).of(self.op)  # kept because TensorRT reads it after the call
            return self.kept

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            with noted(accounts[-1], self.op):
                self.preparation.ready(self._inputs(inputs), self._launcher())

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            with noted(accounts[-1], self.op):
                launcher = self._launcher()
                ready = self.preparation.ready(self._inputs(input_desc), launcher)
                ready.put([*inputs, *outputs, workspace], stream)

        def _inputs(self, described: Iterable[Any]) -> tuple[tuple[Shape, str], ...]:
            return tuple((shape_of(desc.dims), type_of(desc)) for desc in described)

        def _launcher(self) -> "Launcher":
            from wanforge.plugins.launching.driver import launcher

            return launcher()

    return Plugin


def creator_class(trt: Any) -> type:
    """Define the class of all plugin creators on one flavour's module."""

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, op: type[PluginOp], plugin: type) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.op, self.plugin, self.attributes = op, plugin, Attributes(trt, op)
            self.name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
            self.field_names = self.attributes.names()

        def create_plugin(self, name: str, given: Any, phase: Any) -> Any:
            return self.plugin(self.op(**self.attributes.read(given)))

    return Creator


class Registration:
    """The plugins of all ops in one flavour's registry, which takes each name only once.

    Attributes:
        accounts: Those of everyone who uses the plugins, the last user's last.

    Raises:
        ResourceError: A plugin of that name is registered that is not this registration's.
    """

    def __init__(self, library: Library) -> None:
        self.registry = library.trt.get_plugin_registry()
        self.accounts: list[Account] = []
        plugin, creator = plugin_class(library.trt, self.accounts), creator_class(library.trt)
        self.creators: list[Any] = []
        for each in [creator(find_op(folder), plugin) for folder in ALL_OPS]:
            if not self.registry.register_creator(each, NAMESPACE):
                self.remove()
                raise ResourceError(
                    f"{library} already has a plugin named {NAMESPACE}::{each.name} in this process, which something "
                    "else has registered; run wanforge in a process of its own"
                )
            self.creators.append(each)

    def remove(self) -> None:
        """Take the plugins out of the registry."""
        for each in self.creators:
            self.registry.deregister_creator(each)


_registrations: dict[Flavour, Registration] = {}
"""The plugins that are registered in this process."""


@contextmanager
def registered(library: Library) -> Iterator[Account]:
    """Register the plugins of all ops with a flavour, which would otherwise compile their ONNX bodies.

    Within the ``with`` block, what happens to plugins is in the account. Blocks can be nested or overlap, for instance
    if engines are built while others run: the plugins stay registered until the last block ends.

    Raises:
        ResourceError: Something else has registered plugins of these names in this process.
    """
    if library.flavour not in _registrations:
        _registrations[library.flavour] = Registration(library)
    registration, account = _registrations[library.flavour], Account()
    registration.accounts.append(account)
    try:
        yield account
    finally:
        registration.accounts.remove(account)
        if not registration.accounts:
            del _registrations[library.flavour]
            registration.remove()
