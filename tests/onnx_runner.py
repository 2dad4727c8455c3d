"""Run ONNX in ONNX Runtime on PyTorch tensors of any type."""

from collections.abc import Mapping, Sequence

import torch
from onnx import FunctionProto, ModelProto, helper
from torch import Tensor

from wanforge.exporter.onnx_model import check, onnx_model
from wanforge.exporter.tracer import value_info
from wanforge.plugins.onnx_body import DOMAIN, PLUGIN
from wanforge.runtime.backends.ort import new_session
from wanforge.runtime.dtypes import ONNX_NUMBERS

TYPES = {number: dtype for dtype, number in ONNX_NUMBERS.items()}

TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(int8)": torch.int8}


def run_model(
    model: ModelProto | str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Sequence[int]]
) -> list[Tensor]:
    """Run a model, or a model file with external data; `outputs` gives each output's shape.

    Outputs are bound to memory that holds NaN.
    """
    session = new_session(model if isinstance(model, str) else model.SerializeToString())
    binding = session.io_binding()
    kept = {name: tensor.contiguous() for name, tensor in inputs.items()}
    for name, tensor in kept.items():
        binding.bind_input(name, "cpu", 0, ONNX_NUMBERS[tensor.dtype], list(tensor.shape), tensor.data_ptr())
    results = []
    for found in session.get_outputs():
        dtype = TYPES[found.type]
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        result = torch.full(tuple(outputs[found.name]), poison, dtype=dtype)
        binding.bind_output(found.name, "cpu", 0, ONNX_NUMBERS[dtype], list(result.shape), result.data_ptr())
        results.append(result)
    session.run_with_iobinding(binding)
    return results


def run_body(
    name: str,
    functions: Sequence[FunctionProto],
    inputs: Sequence[Tensor],
    shape: Sequence[int],
    attributes: Mapping[str, int | str] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Run the ONNX body of one of the project's ops, after onnx's checker has accepted it. Its result has the type of
    the first input unless another is given."""
    names = [f"input_{i}" for i in range(len(inputs))]
    node = helper.make_node(name, names, ["output"], domain=DOMAIN, **(attributes or {}), **PLUGIN)
    infos = [value_info(n, tuple(t.shape), t.dtype) for n, t in zip(names, inputs, strict=True)]
    graph = helper.make_graph([node], name, infos, [value_info("output", tuple(shape), dtype or inputs[0].dtype)])
    model = onnx_model(graph, functions)
    check(model)
    return run_model(model, dict(zip(names, inputs, strict=True)), {"output": shape})[0]
