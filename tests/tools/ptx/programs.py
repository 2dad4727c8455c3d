"""Small kernels in PTX for tests."""

import ctypes
from collections.abc import Sequence

import numpy as np

from tools.ptx.machine import Launch, Modes
from tools.ptx.memory import GlobalMemory, Region
from tools.ptx.syntax import Kernel, read_kernel
from tools.ptx.tensor_maps import BYTES, EncodedMap

SHARED = 1280
"""Bytes of shared memory."""

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1,
    .param .align 64 .b8 kernel_param_2[128]
)
.reqntid {threads}
{{
    .reg .pred %p<8>;
    .reg .b16 %rs<8>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<16>;
    ld.param.b64 %rd0, [kernel_param_0];
    ld.param.b64 %rd1, [kernel_param_1];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mul.wide.u32 %rd2, %r0, 4;
    add.s64 %rd3, %rd0, %rd2;
    add.s64 %rd4, %rd1, %rd2;
    shl.b32 %r2, %r0, 2;
"""
"""Begins a kernel of two tensors and a tensor map. %r0 is the thread, %r1 the block; %rd3 and %rd4 are the addresses of
the thread's 32-bit element in each tensor, and %r2 is its place in shared memory."""


def kernel_of(body: str, threads: int = 32) -> Kernel:
    """The kernel with a body."""
    return read_kernel(HEAD.format(threads=threads) + body + "\n    ret;\n}\n")


def run(
    body: str | Kernel,
    source: Sequence[float] | np.ndarray,
    results: int,
    *,
    threads: int = 32,
    blocks: int = 1,
    modes: Modes | None = None,
    box: EncodedMap | None = None,
) -> np.ndarray:
    """Run a kernel from an array of float32 or 32-bit integers to one of `results` 32-bit words, which are returned. A
    tensor map begins where the array does."""
    values = np.ascontiguousarray(source, np.float32 if np.asarray(source).dtype.kind == "f" else np.uint32)
    found = np.full(results, 0xFFFFFFFF, np.uint32)
    memory = GlobalMemory()
    for name, array, is_written in (("source", values, 1), ("result", found, 0)):
        region = memory.add(Region.at(name, array.ctypes.data, array.nbytes))
        region.inside[: array.nbytes], region.written[: array.nbytes] = 1, is_written
    kernel = body if isinstance(body, Kernel) else kernel_of(body, threads)
    encoded = bytes(BYTES) if box is None else box._replace(address=values.ctypes.data).to_bytes()
    addresses = [bytes(ctypes.c_uint64(array.ctypes.data)) for array in (values, found)]
    Launch(kernel, (blocks, 1, 1), [*addresses, encoded], SHARED, memory, modes or Modes()).run(side_by_side=2)
    return found
