"""Run a reference network on tensors without data, and record what it does as ONNX nodes.

The reference is ordinary PyTorch; every call it makes on a `Traced` tensor is handled in `lowerings.py`, which adds
nodes to a `Tape`. Tracing a graph takes milliseconds, and the result depends on the reference alone.
docs/decisions/0002-own-tracer.md explains why PyTorch's exporter is not used.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import FunctionProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from wanforge.engines.bundle.shapes import Dim, Shape, Size
from wanforge.runtime.dtypes import ONNX_NUMBERS

Lowering = Callable[..., Any]
LOWERINGS: dict[str, Lowering] = {}
"""The lowering of each PyTorch function, by the function's name."""


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Register the lowering of PyTorch functions, which is called with the tape and the function's own arguments."""

    def register(lowering: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(names, lowering))
        return lowering

    return register


class Tape:
    """The nodes recorded so far. The same operation on the same values is recorded only once.

    Attributes:
        declared: Values whose types and shapes the graph has to state.
    """

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.inputs: dict[str, Traced] = {}
        self.declared: list[Traced] = []
        self._known: dict[Any, list[str]] = {}
        self._counts: dict[str, int] = {}

    def input(self, name: str, shape: Shape, dtype: torch.dtype) -> "Traced":
        """Declare a graph input."""
        self.inputs[name] = Traced(self, name, shape, dtype)
        return self.inputs[name]

    def node(
        self,
        op: str,
        inputs: Sequence["Traced | Tensor | str"],
        outputs: int = 1,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Record one node and return the names of its outputs. Real tensors among the inputs become constants."""
        names = [self.name_of(x) for x in inputs]
        key = (domain, op, tuple(names), outputs, repr(sorted(attributes.items())))
        if key not in self._known:
            self._counts[op] = number = self._counts.get(op, -1) + 1
            results = [f"{op}_{number}" if outputs == 1 else f"{op}_{number}.{i}" for i in range(outputs)]
            self.nodes.append(helper.make_node(op, names, results, name=f"{op}_{number}", domain=domain, **attributes))
            self._known[key] = results
        return self._known[key]

    def emit(
        self,
        op: str,
        inputs: Sequence["Traced | Tensor | str"],
        shape: Shape,
        dtype: torch.dtype,
        **attributes: Any,
    ) -> "Traced":
        """Record a node with one output of a known shape and type."""
        return Traced(self, self.node(op, inputs, **attributes)[0], shape, dtype)

    def inline(
        self, function: FunctionProto, inputs: Sequence["Traced | Tensor"], shape: Shape, dtype: torch.dtype
    ) -> "Traced":
        """Record the nodes of a function with one output of a known shape and type."""
        names = dict(zip(function.input, map(self.name_of, inputs), strict=True))
        for node in function.node:
            attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            given = [names[name] for name in node.input]
            found = self.node(node.op_type, given, len(node.output), domain=node.domain, **attributes)
            names |= dict(zip(node.output, found, strict=True))
        return Traced(self, names[function.output[0]], shape, dtype)

    def name_of(self, x: "Traced | Tensor | str") -> str:
        if isinstance(x, str):
            return x
        return x.name_ if isinstance(x, Traced) else self.constant(x)

    def constant(self, value: Tensor) -> str:
        """Record a constant and return its name; equal constants share one."""
        tensor = tensor_proto(value)
        key = ("constant", tensor.data_type, tuple(tensor.dims), tensor.raw_data)
        if key not in self._known:
            name = f"constant_{sum(n.op_type == 'Constant' for n in self.nodes)}"
            self.nodes.append(helper.make_node("Constant", [], [name], name=name, value=tensor))
            self._known[key] = [name]
        return self._known[key][0]

    def shape_tensor(self, dims: Sequence[Dim], free: int | None = None) -> str:
        """Record a shape as an int64 vector and return its name; the dimension at index `free` will be inferred."""
        pieces: list[str] = []
        fixed: list[int] = []
        for index, dim in enumerate(dims):
            if index == free or isinstance(dim, int):
                fixed.append(dim if isinstance(dim, int) else -1)
                continue
            if fixed:
                pieces.append(self.constant(torch.tensor(fixed)))
                fixed = []
            pieces.append(self.size(dim))
        if fixed:
            pieces.append(self.constant(torch.tensor(fixed)))
        return pieces[0] if len(pieces) == 1 else self.node("Concat", pieces, axis=0)[0]

    def size(self, size: Size) -> str:
        """Record a run-time size, read from an input's shape, as an int64 vector of one element; return its name."""
        result = self._named_size(size.names[0], size.factor)
        for name in size.names[1:]:
            result = self.node("Mul", [result, self._named_size(name, 1)])[0]
        return result

    def _named_size(self, name: str, factor: int) -> str:
        for traced in self.inputs.values():
            for axis, dim in enumerate(traced.shape_):
                if isinstance(dim, Size) and dim.names == (name,):
                    size = self.node("Shape", [traced], start=axis, end=axis + 1)[0]
                    if factor == dim.factor:
                        return size
                    op, ratio = ("Mul", factor // dim.factor) if factor > dim.factor else ("Div", dim.factor // factor)
                    return self.node(op, [size, torch.tensor([ratio])])[0]
        raise AssertionError(f"no input has the size {name}")


class Traced(Tensor):
    """A tensor without data, known by its name, shape and type. Calls on it are recorded on its tape."""

    tape_: Tape
    name_: str
    shape_: Shape

    @staticmethod
    def __new__(cls, tape: Tape, name: str, shape: Shape, dtype: torch.dtype) -> "Traced":
        traced: Traced = torch.Tensor._make_wrapper_subclass(cls, (), dtype=dtype, device=torch.device("meta"))
        traced.tape_, traced.name_, traced.shape_ = tape, name, tuple(shape)
        return traced

    def __init__(self, tape: Tape, name: str, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        if name == "__get__":
            return _attribute(func, args[0])
        if name not in LOWERINGS:
            raise NotImplementedError(f"{name} has no lowering to ONNX; add one to exporter/lowerings.py")
        return LOWERINGS[name](_tape_of(args), *args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.name_}: {self.dtype} {[str(dim) for dim in self.shape_]}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, *rest: Any) -> Any:
        raise AssertionError(f"{func} reached the dispatcher without a lowering")


def _attribute(getter: Any, traced: Traced) -> Any:
    match getter.__self__.__name__:
        case "shape":
            return traced.shape_
        case "ndim":
            return len(traced.shape_)
        case "device":
            return torch.device("cpu")  # where constants are made, which PyTorch evaluates during the trace
    with torch._C.DisableTorchFunctionSubclass():
        return getter(traced)


def _tape_of(args: Sequence[Any]) -> Tape:
    for arg in args:
        for leaf in arg if isinstance(arg, (list, tuple)) else [arg]:
            if isinstance(leaf, Traced):
                return leaf.tape_
    raise AssertionError("no traced tensor among the arguments")


def tensor_proto(value: Tensor) -> TensorProto:
    """A PyTorch tensor as ONNX data, bfloat16 included."""
    if value.dtype == torch.bfloat16:
        bits = value.contiguous().view(torch.int16).numpy()
        return helper.make_tensor("", TensorProto.BFLOAT16, list(value.shape), bits.tobytes(), raw=True)
    return numpy_helper.from_array(value.contiguous().numpy())


def value_info(name: str, shape: Shape, dtype: torch.dtype) -> ValueInfoProto:
    """The ONNX declaration of a graph's input or output."""
    return helper.make_tensor_value_info(
        name, ONNX_NUMBERS[dtype], [dim if isinstance(dim, int) else str(dim) for dim in shape]
    )


def is_native(dtype: torch.dtype) -> bool:
    """Whether a graph of this compute type has TensorRT's own ops where ONNX has none. Engines are built from graphs in
    bfloat16, in which ONNX Runtime does not compute on a CPU."""
    return dtype == torch.bfloat16


def live_nodes(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that the outputs depend on, in order."""
    needed, live = set(outputs), []
    for node in reversed(nodes):
        if needed & set(node.output):
            live.append(node)
            needed |= set(node.input)
    return live[::-1]
