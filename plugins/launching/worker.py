"""The child process that compiles kernels: JSON requests on stdin, JSON answers on stdout, one per line.

This is a separate process because Triton decides when it is imported whether kernels are interpreted, and because a
compiler that crashes takes its process with it. It does not import torch, so that it starts quickly.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from wanforge.plugins.launching import SCRATCH, Constant
from wanforge.plugins.tensor_map.parameters import expanded, is_map

TENSOR_CORE = re.compile(r"\b[A-Z]+MMA(?:\.\w+)*")
"""IMMA, HMMA, QMMA and OMMA are mma.sync; IGMMA, HGMMA and QGMMA are wgmma; UTC*MMA is tcgen05. HFMA2.MMA,
an addition, is not matched."""

PARAMETER = re.compile(r"\.param (?:\.align (\d+) )?\.[busf](\d+)[^,\[]*(?:\[(\d+)\])?")
"""The declaration of a parameter in PTX: what it is aligned by, and bits and number of its elements."""

WARNING = re.compile(r"\(C75\d\d\) (?:Potential Performance Loss: )?(.*?)(?: in the function '\w+')?$", re.MULTILINE)
"""What the assembler says of instructions that run one after the other although they could overlap."""


class CompileRequest(msgspec.Struct, frozen=True):
    """The fields of a `Specialisation`."""

    kernel: str
    types: list[tuple[str, str]]
    constants: list[tuple[str, Constant]]
    num_warps: int
    num_stages: int
    sm: int


class Compiled(msgspec.Struct, frozen=True, tag=True):
    """A cubin and what the compiler reports about it."""

    code: bytes
    ptx: str
    entry: str
    parameters: list[tuple[str, str]]
    threads: int
    shared_bytes: int
    tensor_memory: int
    registers: int
    spill_bytes: int
    mma: list[str]
    warnings: list[str]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The reason why a kernel does not compile."""

    message: str


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Whatever the compiler prints must not get mixed with the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin.buffer:
        answers.write(msgspec.json.encode(answer(msgspec.json.decode(line, type=CompileRequest))) + b"\n")
        answers.flush()


def answer(request: CompileRequest) -> Compiled | Failed:
    try:
        return compile_kernel(request)
    # The parent reports every failure of the compiler.
    except Exception as error:
        causes = [error]
        while isinstance(cause := causes[-1].__cause__, Exception):
            causes.append(cause)
        return Failed("\n".join(str(cause).strip() or type(cause).__name__ for cause in causes))


def compile_kernel(request: CompileRequest) -> Compiled:
    """Compile one kernel for one architecture."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    op, _, name = request.kernel.rpartition(".")
    function = getattr(import_module(f"wanforge.plugins.{op}.kernel"), name)
    types, constants = dict(request.types), dict(request.constants)
    if wrong := set(function.arg_names) ^ (types.keys() | constants.keys()):
        raise TypeError(f"parameters and arguments differ in {', '.join(sorted(wrong))}")
    parameters = [(name, types[name]) for name in function.arg_names if name in types]
    source = (GluonASTSource if function.is_gluon() else ASTSource)(
        fn=function,
        signature={name: types.get(name, "constexpr").removesuffix(":16") for name in function.arg_names},
        constexprs=constants,
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name, t in parameters if is_aligned(t)},
    )
    # A product and a sum are only one rounding where the kernel says so, by tl.fma.
    options = {"num_warps": request.num_warps, "num_stages": request.num_stages, "enable_fp_fusion": False}
    with knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as said:
        knobs.nvidia.dump_ptxas_log = True
        made = triton.compile(source, target=GPUTarget("cuda", request.sm, 32), options=options)
    code, metadata = made.asm["cubin"], made.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError("the kernel needs scratch memory, which the launcher does not provide")
    packed = list(expanded(parameters))
    check_parameters(made.asm["ptx"], metadata.name, packed)
    registers, spill_bytes = resources(code, metadata.name)
    return Compiled(
        code,
        made.asm["ptx"],
        metadata.name,
        packed,
        32 * metadata.num_warps,
        metadata.shared,
        getattr(metadata, "tmem_size", None) or 0,
        registers,
        spill_bytes,
        # Without mma in the PTX there is none in the machine code, and disassembling takes longer than ptxas.
        tensor_core_instructions(code) if "mma" in made.asm["ptx"] else [],
        sorted(set(WARNING.findall(said.getvalue()))),
    )


def is_aligned(kind: str) -> bool:
    """Whether a parameter is a multiple of 16: pointers always are, integers if their type says so."""
    return kind.startswith("*") or kind.endswith(":16")


def check_parameters(ptx: str, entry: str, packed: list[tuple[str, str]]) -> None:
    """Refuse a kernel whose parameters are not those that the launcher packs.

    Raises:
        ValueError: Its PTX declares others.
    """
    expected = [place_of(kind) for _, kind in packed] + SCRATCH * [place_of("*")]
    if (found := declared_parameters(ptx, entry)) != expected:
        raise ValueError(
            f"{entry} has parameters of {found} (bytes and alignment), and the launcher packs {expected}, because this "
            "version of Triton lays them out in another way; install the one that wanforge asks for"
        )


def place_of(kind: str) -> tuple[int, int]:
    """The bytes and the alignment of a parameter of the machine code."""
    if is_map(kind):
        return 128, 64
    return (4, 4) if kind.removesuffix(":16") in ("i32", "fp32") else (8, 8)


def declared_parameters(ptx: str, entry: str) -> list[tuple[int, int]]:
    """The bytes and the alignment of each parameter, as the PTX of a kernel declares them."""
    declared = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)", ptx, re.DOTALL)
    found = PARAMETER.findall(declared[1]) if declared else []
    return [(int(bits) // 8 * int(count or 1), int(alignment or int(bits) // 8)) for alignment, bits, count in found]


def resources(code: bytes, entry: str) -> tuple[int, int]:
    """The number of registers and the bytes of local memory that each thread uses."""
    usage = _inspect("cuobjdump", code, "-res-usage")
    numbers = re.search(rf"Function {re.escape(entry)}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if numbers is None:
        raise ValueError(f"cuobjdump reports no registers for {entry}: {usage}")
    registers, stack, local = map(int, numbers.groups())
    return registers, stack + local


def tensor_core_instructions(code: bytes) -> list[str]:
    """The kinds of matrix instructions in the machine code, sorted."""
    return sorted(set(TENSOR_CORE.findall(_inspect("nvdisasm", code, "-c", "-ndf"))))


def _inspect(tool: str, code: bytes, *options: str) -> str:
    """The output of one of the tools in Triton's package for a cubin."""
    from triton import knobs

    program: Any = getattr(knobs.nvidia, tool)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        done = subprocess.run([program.path, *options, str(path)], capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
