"""A plugin as TensorRT has it after it has loaded an engine, whose `enqueue` runs on the machine for PTX."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.tensorrt_flavours import rtx
from tools.ptx.bench import Bench
from tools.ptx.memory import Region
from wanforge.plugins.launching import driver
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.tensorrt.plugin import NAMESPACE, TYPES, VERSION, Attributes, PluginOp, registered

STREAM = 0x7000
WORKSPACE_ALIGNMENT = 256
"""Bytes to whose multiples TensorRT aligns the workspace."""


def in_an_engine(trt: Any, fields: Any) -> Any:
    """Fields as an engine keeps them: the same bytes elsewhere in memory."""
    return trt.PluginFieldCollection([trt.PluginField(each.name, each.data.copy(), each.type) for each in fields])


def described(trt: Any, shape: Sequence[int], dtype: torch.dtype) -> Any:
    """TensorRT's description of a tensor."""
    types = {torch_name: name for name, torch_name in TYPES.items()}
    found = trt.PluginTensorDesc()
    found.dims, found.format = trt.Dims(list(shape)), trt.TensorFormat.LINEAR
    found.type = getattr(trt.DataType, types[str(dtype).removeprefix("torch.")])
    return found


@dataclass(frozen=True)
class Workspace:
    """The memory that a plugin is given for its temporaries.

    Attributes:
        missing: By how many bytes it is smaller than the temporaries.
        shift: By how many bytes it begins after an aligned address.
    """

    missing: int = 0
    shift: int = 0


class LoadedPlugin:
    """A plugin that was read from the fields in an engine and attached to a context.

    Attributes:
        plugin: What TensorRT calls.
        output: The output of the last run; elements that were not written are NaN.
    """

    def __init__(self, op: PluginOp, bench: Bench) -> None:
        self.op, self.bench, self.trt = op, bench, rtx().trt
        creator = self.trt.get_plugin_registry().get_creator(op.name, VERSION, NAMESPACE)
        built = creator.create_plugin("", fields_of_a_node(self.trt, op), self.trt.TensorRTPhase.BUILD)
        kept = in_an_engine(self.trt, built.get_fields_to_serialize())
        read = creator.create_plugin("", kept, self.trt.TensorRTPhase.RUNTIME)
        self.plugin = read.attach_to_context(None)
        self.output = torch.empty(0)

    def run(self, inputs: Sequence[Tensor], workspace: Workspace = Workspace()) -> Tensor:
        """Give memory to the plugin, let it prepare for the shapes, and enqueue it."""
        given = [described(self.trt, each.shape, each.dtype) for each in inputs]
        shape = self.op.output([list(each.shape) for each in inputs])
        output = described(self.trt, shape, inputs[0].dtype)
        self.output = torch.full(shape, float("nan"), dtype=inputs[0].dtype)
        self.bench.leave_unwritten(self.output)
        for name, tensor in zip([*self.op.inputs, "output"], [*inputs, self.output], strict=True):
            self.bench.add(name, tensor, STREAM)
        address = self._workspace(given, output, inputs, workspace)
        self.plugin.on_shape_change(given, [output])
        addresses = [each.data_ptr() for each in inputs]
        self.plugin.enqueue(given, [output], addresses, [self.output.data_ptr()], address, STREAM)
        return self.output

    def _workspace(self, given: Sequence[Any], output: Any, inputs: Sequence[Tensor], workspace: Workspace) -> int:
        """Let kernels use the places of the plan in as much memory as the plugin asks for; the address is returned."""
        size = self.plugin.get_workspace_size([largest(self.trt, each) for each in given], [largest(self.trt, output)])
        self.memory = torch.full((size + 2 * WORKSPACE_ALIGNMENT,), 0xFF, dtype=torch.uint8)
        start = self.memory.data_ptr() + -self.memory.data_ptr() % WORKSPACE_ALIGNMENT + workspace.shift
        types = [(tuple(each.shape), str(each.dtype).removeprefix("torch.")) for each in inputs]
        plan, places = self.op.plan(types, self.bench.sm), [(0, 0)]
        for planned in plan.launches:
            for name, tensor in planned.launch.tensors.items():
                if planned.addresses[name].base == len(inputs) + 1:
                    places.append((planned.addresses[name].offset, tensor.nbytes))
        end = max(offset + nbytes for offset, nbytes in places)
        assert end <= size
        given_bytes = end - workspace.missing if workspace.missing else size
        region = self.bench.memory.add(Region.at("workspace", start, given_bytes))
        region.stream = STREAM
        for offset, nbytes in places:
            region.inside[: len(region.data)][offset : offset + nbytes] = 1
        return start


def fields_of_a_node(trt: Any, op: PluginOp) -> Any:
    """The fields that the ONNX parser gives for a node."""
    return Attributes(trt, type(op)).of(op)


def largest(trt: Any, desc: Any) -> Any:
    """A description for a range of shapes that has one shape."""
    found = trt.DynamicPluginTensorDesc()
    found.desc, found.min, found.opt, found.max = desc, desc.dims, desc.dims, desc.dims
    return found


def compile_for(op: PluginOp, inputs: Sequence[Tensor], bench: Bench) -> None:
    """Compile the kernels that a plugin launches."""
    types = [(tuple(each.shape), str(each.dtype).removeprefix("torch.")) for each in inputs]
    launches = [planned.launch for planned in op.plan(types, bench.sm).launches]
    compile_kernels(launches, bench.folder, ptx=True)


@contextmanager
def on_the_machine(bench: Bench) -> Iterator[None]:
    """Register the plugins, and let them launch on a bench."""
    with (
        registered(rtx()),
        mock.patch.object(driver, "launcher", return_value=bench.launcher),
        mock.patch.dict("os.environ", {"WANFORGE_KERNELS": str(bench.folder)}),
    ):
        yield
