"""`enqueue` of the TensorRT plugins, called as TensorRT calls it after loading an engine, computes what the definitions
say, on the machine for PTX."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.numerics import relative_rms
from tests.tools.ptx.enqueue import STREAM, LoadedPlugin, compile_for, on_the_machine
from tools.ptx.bench import Bench
from tools.ptx.cases import row_weight, tile_weight
from tools.ptx.proof import error_in_ulp, randn
from wanforge.plugins.sparse_linear_attention.plugin import SparseLinearAttentionPlugin
from wanforge.plugins.sparse_linear_attention.reference import Blocks, sparse_linear_attention
from wanforge.plugins.tensorrt.plugin import PluginOp
from wanforge.plugins.w8a8_linear.plugin import W8A8LinearPlugin
from wanforge.plugins.w8a8_linear.reference import w8a8_linear

pytestmark = pytest.mark.slow

ATTENTION = ["statistics", "keys_values", "linear_state", "scores", "select", "attention"]


def enqueued(op: PluginOp, inputs: list[Tensor], bench: Bench) -> Tensor:
    compile_for(op, inputs, bench)
    with on_the_machine(bench):
        return LoadedPlugin(op, bench).run(inputs)


@pytest.mark.parametrize("sm", [pytest.param(89, marks=pytest.mark.exhaustive), 90])
@pytest.mark.parametrize(
    ("weight", "kernels"), [(tile_weight, ["quantise", "gemm"]), (row_weight, ["quantise_rows", "gemm_rows"])]
)
def test_a_linear_is_the_reference(
    folder: Path, sm: int, weight: Callable[..., tuple[Tensor, ...]], kernels: list[str]
) -> None:
    bench = Bench(sm, folder)
    inputs = [randn(1, 200, 256, seed=1, dtype=torch.bfloat16), *weight(384, 256, 2, torch.bfloat16)]
    found = enqueued(W8A8LinearPlugin(), inputs, bench)
    assert error_in_ulp(found, w8a8_linear(*inputs)) <= 2  # as for the linears of the proof
    assert bench.cuda.launched == [(kernel, STREAM) for kernel in kernels]


@pytest.mark.parametrize("sm", [*(pytest.param(sm, marks=pytest.mark.exhaustive) for sm in (80, 89)), 90])
def test_attention_is_the_reference(folder: Path, sm: int) -> None:
    """The engine says fp8, which becomes fp16 on sm_80."""
    bench, op = Bench(sm, folder), SparseLinearAttentionPlugin(128, 64, "sage_fp8")
    q, k, v = (randn(1, 200, 2, 128, seed=seed, dtype=torch.bfloat16) for seed in (1, 2, 3))
    proj, bias = (randn(*shape, seed=5, dtype=torch.bfloat16) / 11 for shape in ((128, 128), (128,)))
    found = enqueued(op, [q, k, v, torch.zeros(2, dtype=torch.int32), proj, bias], bench)
    blocks = Blocks(128, 64, "sage_fp16" if sm == 80 else "sage_fp8")
    defined = sparse_linear_attention(q, k, v, 2, proj, bias, blocks)
    # On Hopper, probabilities are rounded relative to the maximum of two blocks (decision 0047): to other steps of e4m3
    # than the definition's, but no further from attention without rounding.
    assert error_in_ulp(found, defined) <= (32 if sm == 90 else 8)
    exact = sparse_linear_attention(
        *(x.float() for x in (q, k, v)), 2, proj.float(), bias.float(), Blocks(128, 64, "sla")
    )
    assert relative_rms(found, exact) < 1.01 * relative_rms(defined, exact)
    assert bench.cuda.launched == [(kernel, STREAM) for kernel in ATTENTION]
