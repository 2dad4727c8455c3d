"""No kernel reads or writes past its tensors: each ends where accessible memory ends, so that going past it crashes.

This is tested only in the interpreter, in a process of its own.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

PRELUDE = """
import ctypes, mmap
import torch

libc, PAGE, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

def empty(*shape, dtype=torch.float32, device=None):
    sizes = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    size = -(-sizes.numel() * dtype.itemsize // 16) * 16
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, (pages + 1) * PAGE)
    kept.append(area)
    end = ctypes.addressof(ctypes.c_char.from_buffer(area)) + pages * PAGE
    assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(PAGE), 0) == 0
    return torch.frombuffer(area, dtype=dtype, count=sizes.numel(), offset=pages * PAGE - size).view(sizes)

def edge(x):
    return empty(x.shape, dtype=x.dtype).copy_(x)

torch.empty = empty
torch.manual_seed(0)
"""

CASES = {
    "w8a8_linear": """
from wanforge.plugins.w8a8_linear.fused import *
from wanforge.plugins.quantiser.fused import quantise, quantise_rows
from wanforge.plugins.quantiser.reference import quantise_rows as rows_of, quantise_tiles
from wanforge.plugins.row_moments.fused import unmeasured
from wanforge.plugins.w8a8_linear.scaled_product import scaled_linear_gelu
x, residual = edge(torch.randn(133, 256)), edge(torch.randn(133, 128))
zeros, e4m3 = torch.zeros(128), torch.float8_e4m3fn
for quantiser, weigh in ((quantise, quantise_tiles), (quantise_rows, rows_of)):
    weights = [Weight(*map(edge, (*weigh(torch.randn(128, 256)), torch.randn(128)))) for _ in range(3)]
    q = quantiser(x)
    scaled_linear_gelu(quantise_rows(x, e4m3), Weight(*map(edge, (*rows_of(torch.randn(128, 256), e4m3), zeros))))
    linears(q, weights), linear_gelu(q, weights[0])
    linear_residual(q, weights[0], residual, edge(torch.randn(128)), *unmeasured(empty(133, 128)))
    measured_linear(q, weights[0])
""",
    "nvfp4_linear": """
from wanforge.plugins.block_quantiser.fused import empty_four_bits, quantise
from wanforge.plugins.dense_attention.fused import dense_attention_into
from wanforge.plugins.layer_norm.fused import Affine, norm_four_bits
from wanforge.plugins.nvfp4_linear.fused import *
from wanforge.plugins.nvfp4_linear.reference import quantise_weight
x, residual, gain = edge(torch.randn(133, 256)), edge(torch.randn(133, 128)), edge(torch.randn(256))
one, bias = edge(torch.ones(())), edge(torch.randn(128))
weights = [FourBitWeight(*map(edge, quantise_weight(torch.randn(128, 256), one)), one, bias) for _ in range(3)]
q = quantise(x)
linears(q, weights), linear_gelu(q, weights[0]), measured_linear(q, weights[0])
linear_residual(q, weights[0], residual, edge(torch.randn(128)), unmeasured(empty(133, 128)))
norm_four_bits(x, Affine(gain, gain, 1e-6, True, False))
dense_attention_into(empty_four_bits(133, 256, x.device), (x, x, x), edge(torch.randn(133)))
""",
    "norms": """
from wanforge.plugins.gated_residual.fused import add_gated
from wanforge.plugins.layer_norm.fused import Affine, norm, norm_quantised, norm_quantised_rows
from wanforge.plugins.rms_norm_rope.fused import rms_norm_rotate
from wanforge.plugins.row_moments.fused import KnownRows, measured
x, y, gain = edge(torch.randn(133, 256)), edge(torch.randn(133, 256)), edge(torch.randn(256))
norm(x, gain, gain, 1e-6, modulated=True), norm_quantised(KnownRows(x), Affine(gain, gain, 1e-6, False, False))
norm_quantised(measured(x), Affine(gain, gain, 1e-6, True, False))
norm_quantised_rows(x, Affine(gain, gain, 1e-6, True, False), torch.int8)
angles = edge(torch.randn(133, 64)), edge(torch.randn(133, 64))
rms_norm_rotate([x, y], [gain, gain], 1e-6, angles)
rms_norm_rotate([x, y], [gain, gain], 1e-6, angles, empty(133, 256))
add_gated(x, y, gain, empty(133, 256))
""",
    "channel_norm": """
from wanforge.plugins.channel_norm.fused import *
frames, gain = lambda *shape: edge(torch.randn(shape)), edge(torch.randn(24))
for stream in (Stream(frames(3, 6, 10, 24), frames(3, 6, 10, 24)), Stream(frames(3, 4, 6, 4, 24))):
    for past in (None, frames(2, 6, 10, 24)):
        normed(stream, gain, History(past, empty(2, 6, 10, 24))), joined(stream, History(past, empty(2, 6, 10, 24)))
    normed(stream, gain, History(None, empty(2, 6, 10, 24, dtype=torch.int8)), steps_C=gain)
    normed(stream, gain, activates=False), summed(stream), forget(History(None, empty(2, 6, 10, 24)))
""",
    "int8_convolution": """
from wanforge.plugins.int8_convolution.fused import *
def numbers(*shape): return edge(torch.randint(-127, 128, shape, dtype=torch.int8))
for inputs, outputs in ((24, 40), (32, 96)):
    weight = ConvolutionWeight(numbers(outputs, 27 * inputs), *(edge(torch.randn(outputs)) for _ in range(2)))
    convolve(numbers(5, 6, 10, inputs), weight, torch.float32, edge(torch.randn(3, 6, 10, outputs)))
    convolve(numbers(5, 6, 10, inputs), weight, torch.float32, around=0)
""",
    "dense_attention": """
from wanforge.plugins.dense_attention.fused import *
from wanforge.plugins.quantiser.fused import empty_quantised
from wanforge.plugins.row_moments.fused import measured
q, k, v, bias = (edge(torch.randn(*shape)) for shape in ((133, 256), (21, 256), (21, 256), (21,)))
dense_attention(q, k, v, bias), dense_attention_into(empty_quantised(133, 256, q.device), (q, k, v), bias)
dense_attention(q, k, v, bias, QueryNorm(measured(q).moments_2TL, edge(torch.randn(256)), 1e-6))
chunk_attention(q, (k, v), Own(*(edge(torch.randn(133, 256)) for _ in range(2))), edge(torch.randn(154)))
""",
    "recall": """
from wanforge.plugins.recall.fused import *
e4m3, places = torch.float8_e4m3fn, edge(torch.arange(63, 42, -1, dtype=torch.int32))
angles, out = (edge(torch.randn(21, 64)), edge(torch.randn(21, 64))), (empty(21, 384), empty(21, 384))
rows, scales = torch.randn(64, 384), (edge(torch.randn(1, 384).to(e4m3)), edge(torch.randn(64, 6).to(e4m3)))
recall_into(out, KeptRows(edge(rows), edge(rows)), places, angles)
for codes in (rows.to(torch.int8), rows.to(e4m3)):
    recall_into(out, KeptRows(edge(codes), edge(codes), *scales), places, angles)
""",
    "sparse_linear_attention": """
from wanforge.plugins.quantiser.fused import empty_quantised
from wanforge.plugins.sparse_linear_attention.fused import *
q, k, v = (edge(torch.randn(261, 256)) for _ in range(3))
proj, bias = edge(torch.randn(128, 128)), edge(torch.randn(128))
for arithmetic in ("sla", "sage_fp16", "sage_fp8"):
    sparse_linear_attention(q, k, v, 2, proj, bias, Blocks(64, 128, arithmetic))
    y, blocks = empty_quantised(261, 256, q.device), Blocks(128, 64, arithmetic)
    sparse_linear_attention_into(y, (q, k, v), 5, (proj, bias), blocks)
""",
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PRELUDE + code]
    environment = {"PYTHONPATH": str(ROOT / "src"), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("op", CASES)
def test_no_kernel_leaves_its_tensors(op: str) -> None:
    done = run(CASES[op])
    assert done.returncode == 0, done.stderr[-500:] or f"killed by signal {-done.returncode}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_the_edge_is_deadly() -> None:
    assert run("ctypes.string_at(edge(torch.zeros(8)).data_ptr(), 33)").returncode == -11
