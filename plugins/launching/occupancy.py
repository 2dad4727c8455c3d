"""How much of a GPU's multiprocessor a compiled kernel takes, and whether it should be shipped."""

from dataclasses import dataclass

from wanforge.plugins.launching.cubins import Cubin

KIB = 1024


@dataclass(frozen=True)
class SMLimits:
    """What an SM has to share among the programs that run on it, beside its 64 K registers."""

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
"""By SM. Source: CUDA C++ Programming Guide, table of technical specifications per compute capability."""

REGISTERS, QUARTERS = 64 * KIB, 4
REGISTER_STEP = 256
"""Registers are given to a warp in multiples of it."""
RESERVED_SHARED, SHARED_STEP = KIB, 128
"""Bytes of shared memory that the system keeps of each program, and multiples in which they are given."""
TENSOR_MEMORY = 512
"""Columns of an SM's tensor memory."""


@dataclass(frozen=True)
class Occupancy:
    """How much of an SM a kernel fills."""

    programs: int
    """That run on one SM at a time."""
    warps: float
    """Share of the warps an SM can hold."""
    shared: float
    """Share of the shared memory a program may have."""


def occupancy(cubin: Cubin) -> Occupancy:
    """What a cubin's registers, shared memory and threads leave room for."""
    limits = LIMITS[cubin.sm]
    warps = cubin.threads // 32
    shared = _rounded_up(cubin.shared_bytes + RESERVED_SHARED, SHARED_STEP)
    # A warp's registers lie in one quarter of the SM.
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
    """Why a cubin should not be shipped: it spills, or its program does not fit an SM."""
    found = []
    if cubin.spill_bytes:
        found.append(f"spills {cubin.spill_bytes} bytes a thread")
    limit = LIMITS[cubin.sm].shared_per_program
    if cubin.shared_bytes > limit:
        found.append(f"needs {cubin.shared_bytes / KIB:.1f} KiB of shared memory, of {limit // KIB}")
    elif occupancy(cubin).programs == 0:
        found.append("does not fit an SM")
    return found
