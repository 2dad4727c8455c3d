"""Failed allocations become one error, however a library reports them."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from tests.onnx_runner import run_model
from wanforge.errors import GpuError, RequestError, ResourceError, message_of, naming
from wanforge.exporter.onnx_model import onnx_model
from wanforge.host.library_errors import library_errors

HUGE = 1 << 58


def huge_in_onnx_runtime() -> object:
    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [HUGE])
    nodes = [
        helper.make_node("Constant", [], ["shape"], value=shape),
        helper.make_node("Expand", ["x", "shape"], ["y"]),
        helper.make_node("ReduceSum", ["y"], ["sum"]),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "sum")]
    graph = helper.make_graph(nodes, "huge", infos[:1], infos[1:])
    return run_model(onnx_model(graph, []), {"x": torch.ones(1)}, {"sum": (1,)})


def no_memory_for_a_process() -> object:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


ALLOCATIONS: dict[str, Callable[[], object]] = {
    "python": lambda: bytearray(HUGE),
    "numpy": lambda: np.empty(HUGE),
    "torch": lambda: torch.empty(HUGE),
    "onnxruntime": huge_in_onnx_runtime,
    "system": no_memory_for_a_process,
}


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_memory_that_runs_out_is_one_error(allocate: Callable[[], object]) -> None:
    with pytest.raises(ResourceError, match=r"memory ran out.*; free some"), library_errors():
        allocate()


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported asynchronously",
        "cudaErrorMisalignedAddress",
        "uncorrectable ECC error encountered",
    ],
)
def test_an_error_of_the_gpu_is_one_line_that_says_what_to_do(said: str) -> None:
    with pytest.raises(GpuError, match="run the command again") as caught, library_errors():
        raise RuntimeError(said)
    assert said.partition("\n")[0] in str(caught.value)
    assert "asynchronously" not in str(caught.value)


@pytest.mark.parametrize(
    "said", ["CUDA out of memory. Tried to allocate 20 GiB", "CUDA error: out of memory", "cudaErrorMemoryAllocation"]
)
def test_memory_of_the_gpu_that_runs_out_is_the_same_error(said: str) -> None:
    with pytest.raises(ResourceError, match="memory ran out"), library_errors():
        raise RuntimeError(said)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        RequestError("the prompt is about running out of memory"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        KeyError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_pass_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, library_errors():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RequestError("the prompt is empty"), "the prompt is empty"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.html"),
            "No space left on device at a.html; free some space or choose another place",
        ),
        (
            OSError(errno.EACCES, "Permission denied"),
            "Permission denied; check the path and its permissions",
        ),
    ],
)
def test_a_message_says_what_is_wrong_where_and_what_to_do(error: RequestError | OSError, message: str) -> None:
    assert message_of(error) == message


@pytest.mark.parametrize(("named", "expected"), [(None, "a.html"), ("b.html", "b.html")])
def test_an_error_of_writing_names_the_file(named: str | None, expected: str) -> None:
    with pytest.raises(OSError, match="full") as caught, naming(Path("a.html")):
        raise OSError(errno.ENOSPC, "full", named)
    assert caught.value.filename == expected
