"""The tracer on small functions: the graph that it records gives the same results in ONNX Runtime as in PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from onnx import helper
from torch import Tensor
from torch.nn import functional as F

import wanforge.exporter.lowerings  # noqa: F401
from tests.numerics import assert_matches
from tests.onnx_runner import run_model
from wanforge.engines.bundle.shapes import Dim, Size
from wanforge.exporter.onnx_model import onnx_model
from wanforge.exporter.tracer import Tape, Traced, live_nodes, value_info

H, W = Size(("h",)), Size(("w",))
SIZES = {"h": 6, "w": 10}

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], tuple[Dim, ...]]] = {
    "arithmetic with numbers on either side": (lambda x: 1.0 / (2.0 - x * 3.0) + 0.5 - x, (2, H, 8)),
    "broadcast": (lambda x: x * x.mean(-1, keepdim=True) + x[:, :1], (2, 3, W)),
    "powers and roots": (lambda x: torch.rsqrt(x.square() + 1.0), (H, 4)),
    "activations": (lambda x: F.gelu(F.silu(x), approximate="tanh"), (H, 4)),
    "softmax": (lambda x: F.softmax(x, -1), (H, 5)),
    "layer norm": (lambda x: F.layer_norm(x, (8,), eps=1e-6), (H, 8)),
    "normalize": (lambda x: F.normalize(x, dim=1), (2, 8, H, W)),
    "casts": (lambda x: x.to(torch.float16).float() + x, (H, 3)),
    "split heads and back": (lambda x: x.unflatten(-1, (-1, 4)).transpose(1, 2).flatten(2), (1, H, 12)),
    "flatten run-time sizes together": (lambda x: x.flatten(1, 2) * 2.0, (2, H, W, 3)),
    "take run-time sizes apart": (lambda x: x.flatten(2).transpose(1, 2).unflatten(1, (H, W)), (2, 4, H, W)),
    "merge a constant into a run-time size": (lambda x: torch.stack((x, x), 2).flatten(1, 2), (2, H, W)),
    "double an image": (
        lambda x: torch.stack((y := torch.stack((x, x * 2.0), -1).flatten(-2), y), -2).flatten(-3, -2),
        (1, 2, H, W),
    ),
    "interleave": (lambda x: torch.stack(x.chunk(2, 1), 3).flatten(2, 3), (1, 4, 3, H, W)),
    "permute": (lambda x: x.permute(2, 0, 1), (2, H, 3)),
    "unbind and stack": (lambda x: torch.stack(x.unbind(1), -1), (H, 3, 2)),
    "concatenate": (lambda x: torch.cat((x, x[:, 1:], x[:, :0]), 1), (H, 3)),
    "slices from either end": (lambda x: torch.cat((x[:, -2:], x[:, 1:3], x[:, 0, None]), 1), (H, 5, 2)),
    "an index that drops an axis": (lambda x: x[:, 0] + x[:, -1], (H, 4, 2)),
    "new axes": (lambda x: (x[None, :, None] + x[:, None]).transpose(0, 1), (4,)),
    "pad either side": (lambda x: F.pad(x, (1, 2, 0, 0, 3, 0)), (1, 2, 3, H, 4)),
    "zeros and repeat": (lambda x: torch.zeros_like(x).repeat(1, 2, 1) + 1.0, (H, 3, W)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x * 2.0, x + 1.0), (1, 2, H, 16)),
    "attention with a bias per key": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x.mean(-1, keepdim=True).transpose(-1, -2)),
        (1, 2, H, 16),
    ),
    "attention with one head": (lambda x: F.scaled_dot_product_attention(x, x, x), (2, 1, H, 16)),
    "attention with a wide head": (lambda x: F.scaled_dot_product_attention(x, x, x), (2, 1, H, 384)),
    "matrix product": (lambda x: x @ x.transpose(-1, -2), (2, H, 4)),
    "constants": (lambda x: (x - constant(x, 1.0, 2.0)) * (1.0 / constant(x, 3.0, 4.0)), (H, 2)),
}


def constant(like: Tensor, *values: float) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def traced(function: Callable[[Tensor], Any], shape: tuple[Dim, ...]) -> tuple[Any, Tape]:
    tape = Tape()
    # A second input gives every run-time size a place to be read from.
    tape.input("sizes", (H, W), torch.float32)
    return function(tape.input("x", shape, torch.float32)), tape


def concrete(shape: tuple[Dim, ...]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else dim.value(SIZES) for dim in shape)


@pytest.mark.parametrize(("function", "shape"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_is_recorded_computes_the_same(
    function: Callable[[Tensor], Any], shape: tuple[Dim, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, tape = traced(function, shape)
    nodes = live_nodes(tape.nodes, [result.name_])
    infos = [value_info(name, t.shape_, t.dtype) for name, t in tape.inputs.items()]
    graph = helper.make_graph(nodes, "test", infos, [value_info(result.name_, result.shape_, result.dtype)])
    x = torch.randn(concrete(shape), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("tests.exporter.test_tracer.H", SIZES["h"])
    monkeypatch.setattr("tests.exporter.test_tracer.W", SIZES["w"])
    expected = function(x)
    assert concrete(result.shape_) == tuple(expected.shape)
    feeds = {"x": x, "sizes": torch.zeros(SIZES["h"], SIZES["w"])}
    actual = run_model(onnx_model(graph, []), feeds, {result.name_: expected.shape})[0]
    assert_matches(actual, expected, 1e-6)


def test_the_same_operation_on_the_same_values_is_recorded_once() -> None:
    _, tape = traced(lambda x: (x * 2.0) + (x * 2.0), (3,))
    assert [node.op_type for node in tape.nodes] == ["Constant", "Mul", "Add"]


def test_nodes_that_nothing_needs_are_left_out() -> None:
    result, tape = traced(lambda x: (x * 2.0, x + 1.0)[1], (3,))
    assert [node.op_type for node in live_nodes(tape.nodes, [result.name_])] == ["Constant", "Add"]


def test_an_unknown_call_stops_with_its_name() -> None:
    with pytest.raises(NotImplementedError, match="cumsum"):
        traced(lambda x: torch.cumsum(x, 0), (3,))


def test_sizes_multiply_and_print() -> None:
    assert str(8 * H) == "8*h"
    assert str(H * W * 2) == "2*h*w"
    assert (W * H).value(SIZES) == 60
    assert W * H == H * W


def test_a_traced_tensor_knows_its_type_and_shape() -> None:
    x = Tape().input("x", (2, H), torch.bfloat16)
    assert isinstance(x, Traced)
    assert x.dtype == torch.bfloat16
    assert x.shape == (2, H)
    assert x.ndim == 2
