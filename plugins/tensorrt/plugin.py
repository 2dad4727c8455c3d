"""Ops as TensorRT plugins: what TensorRT asks of a plugin, answered for any `PluginOp`, in both flavours.

An op says in `plugins/<op>/plugin.py` which types and shapes it takes and what it launches. The ONNX parser finds it by
the name, ``plugin_namespace`` and ``plugin_version`` of a node, see `onnx_body.PLUGIN`.

Which kernels run, and where their temporaries lie in the workspace, is worked out when shapes change; `enqueue` adds
addresses and puts kernels on the stream it is given. Not measured, for want of a GPU with TensorRT: that the flavours
call `on_shape_change` before they capture `enqueue` into a CUDA graph, and what a call costs. Parsing, building and
the launches themselves are tested.

Nothing here imports PyTorch until a plan is made: parsing needs none.
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
from wanforge.errors import WanforgeError
from wanforge.plugins.tensorrt.library import Library

if TYPE_CHECKING:
    from torch import Tensor

    from wanforge.plugins.launching.driver import Launcher, LoadedKernel
    from wanforge.plugins.launching.plan import LaunchPlan, PlannedLaunch

NAMESPACE, VERSION = "wanforge", "1"
OPS = ("w8a8_linear", "sparse_linear_attention")
"""Folders of the ops that have a plugin."""

TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32", "INT64": "int64"}
"""TensorRT's names of element types and PyTorch's."""
COMPUTE = ("float32", "float16", "bfloat16")

DYNAMIC = -1
"""A dimension that TensorRT does not know yet."""

Expression = TypeVar("Expression")
Shape = tuple[int, ...]


class PluginOp(ABC):
    """What TensorRT must know of one op. A subclass is a frozen dataclass of the node's attributes."""

    name: ClassVar[str]
    """Of the node in ONNX."""
    inputs: ClassVar[tuple[str, ...]]

    @abstractmethod
    def types(self, compute: str) -> tuple[tuple[str, ...], ...]:
        """The types that each input may have, once the first has type `compute`, which is the output's too."""

    @abstractmethod
    def check_shapes(self, shapes: Sequence[Shape]) -> None:
        """Refuse shapes, in which a dimension may be `DYNAMIC`.

        Raises:
            ShapeError: the op does not take them.
        """

    @abstractmethod
    def output(self, shapes: Sequence[Sequence[Expression]]) -> list[Expression]:
        """The output's shape, made of the inputs' dimensions, whatever those are."""

    @abstractmethod
    def run(self, inputs: Sequence["Tensor"]) -> "Tensor":
        """Launch the op's kernels."""

    def on(self, sm: int) -> Self:
        """The op as an architecture runs it."""
        return self

    def plan(self, inputs: Sequence[tuple[Shape, str]], sm: int) -> "LaunchPlan":
        """The op's launches for inputs of some shapes and types."""
        import torch

        from wanforge.plugins.launching.plan import plan

        return plan(self.on(sm).run, [(shape, getattr(torch, dtype)) for shape, dtype in inputs], sm)

    def workspace_bytes(self, inputs: Sequence[tuple[Shape, str]]) -> int:
        """What the op needs on whichever architecture it will run: one engine serves several."""
        distinct = {self.on(sm): sm for sm in tiled_architectures()}
        return max(op.plan(inputs, sm).workspace_bytes for op, sm in distinct.items())

    def refusal(self, position: int, found: Sequence[str]) -> str:
        """Why the tensor at `position` (inputs, then the output) is not taken, given the types up to it; empty where
        it is."""
        what = [*self.inputs, "the output"][position]
        wanted = COMPUTE if position == 0 else (*self.types(found[0]), (found[0],))[position]
        if found[position] not in wanted:
            return f"{self.name}: {what} is {found[position]}, and can be {' or '.join(wanted)} only"
        return ""


def find_op(folder: str) -> type[PluginOp]:
    """The op of a folder of `plugins`."""
    found: type[PluginOp] = import_module(f"wanforge.plugins.{folder}.plugin").OP
    return found


@dataclass(frozen=True)
class Ready:
    """A plan whose kernels are loaded."""

    launches: tuple[tuple["PlannedLaunch", "LoadedKernel"], ...]

    def put(self, launcher: "Launcher", bases: Sequence[int], stream: int) -> None:
        """Put every kernel on a stream."""
        for planned, loaded in self.launches:
            values = [planned.value(name, bases) for name, _ in loaded.cubin.parameters]
            launcher.driver.launch(loaded, planned.launch.grid, values, stream)


class Preparation:
    """The plans of one plugin in one execution context, made once per set of shapes."""

    def __init__(self, op: PluginOp) -> None:
        self.op = op
        self.made: dict[tuple[tuple[Shape, str], ...], Ready] = {}

    def ready(self, inputs: tuple[tuple[Shape, str], ...], launcher: "Launcher") -> Ready:
        """The launches for these inputs on the GPU that is current."""
        if inputs not in self.made:
            device = launcher.driver.current_device()
            plan = self.op.plan(inputs, launcher.driver.sm(device))
            loaded = [(planned, launcher.load(device, planned.launch)) for planned in plan.launches]
            self.made[inputs] = Ready(tuple(loaded))
        return self.made[inputs]


@cache
def array_of(value: int | str) -> Any:
    """An attribute's memory, which TensorRT points at and does not keep."""
    if isinstance(value, int):
        return np.array([value], dtype=np.int32)
    return np.array(list(value.encode()), dtype=np.int8)


class Attributes:
    """The node's attributes as TensorRT passes them around."""

    def __init__(self, trt: Any, op: type[PluginOp]) -> None:
        self.trt = trt
        self.kinds = {each.name: each.type for each in fields(op)}  # type: ignore[arg-type]

    def names(self) -> Any:
        """What to look for in a node."""
        return self._collection({name: 0 if kind in (int, "int") else "" for name, kind in self.kinds.items()})

    def of(self, op: PluginOp) -> Any:
        """What the plan of an engine keeps."""
        return self._collection(asdict(op))  # type: ignore[call-overload]

    def _collection(self, values: Mapping[str, int | str]) -> Any:
        kinds = self.trt.PluginFieldType
        found = []
        for name, value in values.items():
            kind = kinds.INT32 if isinstance(value, int) else kinds.CHAR
            found.append(self.trt.PluginField(name, array_of(value), kind))
        return self.trt.PluginFieldCollection(found)

    def read(self, collection: Any) -> dict[str, int | str]:
        """What a node or a plan says; unknown fields are left out."""
        found: dict[str, int | str] = {}
        for each in collection:
            if each.name in self.kinds:
                is_number = self.kinds[each.name] in (int, "int")
                data = np.asarray(each.data)
                found[each.name] = int(data[0]) if is_number else data.tobytes().rstrip(b"\0").decode()
        return found


@dataclass
class Account:
    """What happened to the plugins of a build.

    Attributes:
        refusals: what was not taken and why, for TensorRT's own message does not say.
        calls: each op with the largest inputs that it was sized for.
    """

    refusals: list[str] = field(default_factory=list)
    calls: dict[tuple[PluginOp, tuple[tuple[Shape, str], ...]], None] = field(default_factory=dict)


@contextmanager
def noted(account: Account, op: PluginOp) -> Iterator[None]:
    """Keep what goes wrong, for TensorRT does not pass it on."""
    try:
        yield
    except WanforgeError as error:
        account.refusals.append(f"{op.name}: {error}")
        raise


def plugin_class(trt: Any, account: Account) -> type:
    """The class of all plugins, for one flavour's module."""

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
                account.refusals.append(refusal)
            return not refusal and described[position].desc.format == trt.TensorFormat.LINEAR

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            with noted(account, self.op):
                self.op.check_shapes([shape_of(each.desc.dims) for each in inputs])

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            largest = tuple((shape_of(each.max), type_of(each.desc)) for each in inputs)
            account.calls[self.op, largest] = None
            with noted(account, self.op):
                return self.op.workspace_bytes(largest)

        # Running

        def get_fields_to_serialize(self) -> Any:
            self.kept = Attributes(trt, type(self.op)).of(self.op)  # TensorRT reads it after the call
            return self.kept

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            with noted(account, self.op):
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
            with noted(account, self.op):
                launcher = self._launcher()
                ready = self.preparation.ready(self._inputs(input_desc), launcher)
                ready.put(launcher, [*inputs, *outputs, workspace], stream)

        def _inputs(self, described: Iterable[Any]) -> tuple[tuple[Shape, str], ...]:
            return tuple((shape_of(desc.dims), type_of(desc)) for desc in described)

        def _launcher(self) -> "Launcher":
            from wanforge.plugins.launching.driver import launcher

            return launcher()

    return Plugin


def creator_class(trt: Any) -> type:
    """The class of all creators, for one flavour's module."""

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, op: type[PluginOp], plugin: type) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.op, self.plugin, self.attributes = op, plugin, Attributes(trt, op)
            self.name, self.plugin_namespace, self.plugin_version = op.name, NAMESPACE, VERSION
            self.field_names = self.attributes.names()

        def create_plugin(self, name: str, given: Any, phase: Any) -> Any:
            return self.plugin(self.op(**self.attributes.read(given)))

    return Creator


@contextmanager
def registered(library: Library) -> Iterator[Account]:
    """Let a flavour take the plugins of all ops; without, it compiles their ONNX bodies."""
    account = Account()
    plugin, creator = plugin_class(library.trt, account), creator_class(library.trt)
    creators = [creator(find_op(folder), plugin) for folder in OPS]
    registry = library.trt.get_plugin_registry()
    for each in creators:
        if not registry.register_creator(each, NAMESPACE):
            raise AssertionError(f"a plugin {each.name} is registered already")
    try:
        yield account
    finally:
        for each in creators:
            registry.deregister_creator(each)
