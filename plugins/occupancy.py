"""How much of a GPU's multiprocessor (SM) a compiled kernel uses, and whether it is fit to be shipped."""

from dataclasses import dataclass

from wanforge.plugins.launching.cubins import Cubin

KIB = 1024


@dataclass(frozen=True)
class SMLimits:
    """The limits of an SM besides its 64 K registers: bytes of shared memory, and numbers of warps and programs."""

    shared_per_program: int
    shared: int
    warps: int
    programs: int


LIMITS = {
    80: SMLimits(163 * KIB, 164 * KIB, 64, 32),
    86: SMLimits(99 * KIB, 100 * KIB, 48, 16),
    89: SMLimits(99 * KIB, 100 * KIB, 48, 24),
    90: SMLimits(227 * KIB, 228 * KIB, 64, 32),
    100: SMLimits(227 * KIB, 228 * KIB, 64, 32),
    120: SMLimits(99 * KIB, 100 * KIB, 48, 24),
}
"""By architecture. Source: CUDA C++ Programming Guide, table of technical specifications per compute capability."""

REGISTERS, QUARTERS = 64 * KIB, 4
REGISTER_STEP = 256
"""Registers are allocated to a warp in multiples of this."""
RESERVED_SHARED, SHARED_STEP = KIB, 128
"""Bytes of shared memory that the system reserves for each program, and the multiple in which it is allocated."""
TENSOR_MEMORY = 512
"""Columns of an SM's tensor memory."""


@dataclass(frozen=True)
class Occupancy:
    """How much of an SM a kernel fills."""

    programs: int
    """Programs that run on one SM at a time."""
    warps: float
    """Share of the warps that an SM can hold."""
    shared: float
    """Share of the shared memory that one program may have."""


def occupancy(cubin: Cubin) -> Occupancy:
    """How far a cubin can fill an SM, given its registers, shared memory, tensor memory and threads."""
    limits = LIMITS[cubin.sm]
    warps = cubin.threads // 32
    shared = _rounded_up(cubin.shared_bytes + RESERVED_SHARED, SHARED_STEP)
    # All registers of a warp lie in one quarter of the SM.
    warps_by_registers = QUARTERS * (REGISTERS // QUARTERS // _rounded_up(32 * cubin.registers, REGISTER_STEP))
    programs = min(
        limits.programs,
        limits.warps // warps,
        limits.shared // shared,
        warps_by_registers // warps,
        TENSOR_MEMORY // cubin.tensor_memory if cubin.tensor_memory else limits.programs,
    )
    return Occupancy(programs, programs * warps / limits.warps, cubin.shared_bytes / limits.shared_per_program)


def _rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


def faults(cubin: Cubin) -> list[str]:
    """What speaks against a cubin: its registers spill, instructions that could overlap do not, or a program does not
    fit on an SM."""
    found = list(cubin.warnings)
    if cubin.spill_bytes:
        found.append(f"spills {cubin.spill_bytes} bytes per thread")
    limit = LIMITS[cubin.sm].shared_per_program
    if cubin.shared_bytes > limit:
        found.append(f"needs {cubin.shared_bytes / KIB:.1f} KiB of shared memory, but can have only {limit // KIB}")
    elif occupancy(cubin).programs == 0:
        found.append("does not fit on an SM")
    return found
