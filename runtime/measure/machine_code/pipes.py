"""Which pipe of an SM runs an instruction, and for how many clocks."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from wanforge.errors import ConfigError
from wanforge.runtime.measure.machine_code.disassembly import Instruction
from wanforge.runtime.measure.machine_code.rates import LANES, QUARTERS, Chip

TENSOR, FMA, IMAD, ALU, XU, UNIFORM, SHARED = "tensor", "fma", "imad", "alu", "xu", "uniform", "shared"
TENSOR_MEMORY, ISSUE = "tensor memory", "issue"
PIPES = (TENSOR, FMA, IMAD, ALU, XU, SHARED, TENSOR_MEMORY, UNIFORM, ISSUE)

FLOAT = {"FFMA", "FADD", "FMUL", "FHADD", "FHFMA", "FFMA32I", "FSWZADD"}
PAIRS = {"FFMA2", "FADD2", "FMUL2"}
"""Two float32 results per lane."""
HALF = {"HFMA2", "HADD2", "HMUL2", "HFMA2.MMA", "HADD2.F32"}
SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "POPC", "FLO", "FRND", "BREV"}
MOVES = {"LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS", "REDUX", "CREDUX"}
"""What passes through the load and store unit, at most one warp's worth of banks per clock and SM."""
BANKED = {"LDGSTS", "LDS", "STS", "LDSM", "STSM"}
"""What goes to the banks of shared memory, which may be the same for several lanes."""
GLOBAL = {"LDG", "LDGSTS", "STG"}
SECTOR = 32
"""Bytes that global memory moves at least."""
FREE = {"NOP", "BRA", "EXIT", "BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "BSSY", "BSYNC", "WARPSYNC", "CALL", "RET"}
FREE |= {
    "MEMBAR",
    "FENCE",
    "SYNCS",
    "ARRIVES",
    "ELECT",
    "NANOSLEEP",
    "BREAK",
    "UTCBAR",
    "UTCATOMSWS",
    "UVIRTCOUNT",
    "VOTEU",
    "BPT",
}
FREE |= {
    "S2R",
    "S2UR",
    "R2UR",
    "CS2R",
    "LDC",
    "ULDC",
    "LDCU",
    "ERRBAR",
    "CCTL",
    "UCGABAR",
    "ACQBULK",
    "DEPBAR",
    "WARPSYNC",
}

WARP_MMA = re.compile(r"(?P<kind>[HIOQ])MMA\.(?:SF\.)?(?P<shape>\d+)(?P<sums>\.F16)?")
GROUP_MMA = re.compile(r"(?P<kind>[HIQ])GMMA\.(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)")
TENSOR_MEMORY_MMA = re.compile(r"UTC(?P<kind>[HIQ])MMA")
SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "16864": (16, 8, 64), "884": (8, 8, 4)}
FORMATS = {"I": "int8", "O": "fp4", "Q": "fp8", "H": "half"}
DEPTH = {"int8": 32, "fp8": 32, "half": 16}
TENSOR_MEMORY_MOVE = re.compile(r"(?:LDTM|STTM)(?P<half>\.16dp32bit_t\w+)?\.x(?P<columns>\d+)")
"""A load or a store of tensor memory, of 32 or 16 lanes by so many columns. A warp reaches only the 32 lanes of its
quarter, each of which is assumed to move 4 bytes per clock; no measurement was found."""
DESCRIPTOR = re.compile(r"idesc\[(0x[0-9a-f]+)\]")
"""A descriptor of a product of tcgen05: an eighth of its columns from bit 17 on, a sixteenth of its rows from bit 24
on (PTX, "Instruction descriptor")."""
LEAST_ROWS = 128
"""A product of 64 rows is taken to occupy the tensor cores as long as one of 128; no measurement was found."""
OPERAND_BYTES = 32
"""Bytes of a row of an operand of tcgen05, which come from shared memory at its rate (SemiAnalysis)."""


@dataclass(frozen=True)
class Use:
    """What one warp's instruction occupies.

    Attributes:
        pipe: The pipe of its quarter, or for `SHARED` of the whole SM; empty if it occupies none.
        clocks: For how long.
        shared: Clocks of shared memory that it takes besides, because its operands lie there.
        work: Multiply-adds of tensor cores.
    """

    pipe: str
    clocks: float
    shared: float = 0.0
    work: int = 0


def use_of(instruction: Instruction, chip: Chip) -> Use:
    """What an instruction occupies on a kind of chip.

    Raises:
        ConfigError: The chip has no tensor cores for this format, or the size of a move of tensor memory is not known.
    """
    return _use(instruction.opcode, instruction.operands, instruction.predicate == "@!PT", chip)


@lru_cache(maxsize=8192)
def _use(opcode: str, operands: str, is_off: bool, chip: Chip) -> Use:
    name = opcode.partition(".")[0]
    if is_off or name in FREE:
        return Use("", 0)
    if name.endswith("MMA") and name != "HFMA2.MMA":
        return _tensor(opcode, operands, chip)
    if name in MOVES:
        clocks = max(1.0, _bytes(opcode) * LANES / chip.shared)
        return Use(SHARED, clocks * chip.conflicts if name in BANKED else clocks)
    if move := TENSOR_MEMORY_MOVE.match(opcode):
        return Use(TENSOR_MEMORY, int(move["columns"]) / (2 if move["half"] else 1))
    if name in ("LDTM", "STTM"):
        raise ConfigError(f"the size of {opcode} is not known")
    quarter = LANES * QUARTERS
    if name in PAIRS:
        return Use(FMA, 2 * quarter / chip.fma)
    if name in FLOAT:
        return Use(FMA, quarter / chip.fma)
    if name in HALF:
        return Use(FMA, quarter / min(chip.half, chip.fma))
    if name in SPECIAL:
        return Use(XU, quarter / chip.xu)
    if name == "IMAD":
        # A move or a shift by way of the multiplier.
        return Use(IMAD, quarter / chip.imad)
    if name.startswith("U"):
        return Use(UNIFORM, 2)
    return Use(ALU, quarter / chip.alu)


def _tensor(opcode: str, operands: str, chip: Chip) -> Use:
    """A matrix instruction; rates are of the whole SM, and each quarter computes a quarter of a warpgroup's rows."""
    if match := GROUP_MMA.match(opcode):
        form, n, k = FORMATS[match["kind"]], int(match["n"]), int(match["k"])
        rows, columns = int(match["m"]) // QUARTERS, n
        element = 2 if form == "half" else 1
        # Each warp of the group accounts for a quarter of the right operand, and for its rows of a left one in memory.
        fetched = n * k * element / QUARTERS
        if operands.count("gdesc") and re.match(r"R\d+, gdesc", operands):
            fetched += rows * k * element
        return _timed(form, rows * columns * k, chip, 1.0, fetched / chip.shared)
    if match := TENSOR_MEMORY_MMA.match(opcode):
        return _in_tensor_memory(FORMATS[match["kind"]], opcode, operands, chip)
    match = WARP_MMA.match(opcode)
    if match is None or match["shape"] not in SHAPES:
        raise ConfigError(f"the shape of {opcode} is unknown; add it to {__name__}")
    form = FORMATS[match["kind"]]
    m, n, k = SHAPES[match["shape"]]
    if match["sums"]:
        form += "_fp16"
    return _timed(form, m * n * k, chip, chip.mma_share, 0.0)


def _in_tensor_memory(form: str, opcode: str, operands: str, chip: Chip) -> Use:
    """A product of tcgen05, of which each quarter is given a quarter."""
    found = DESCRIPTOR.search(operands)
    if found is None:
        raise ConfigError(f"the descriptor of {opcode} {operands} is not a constant, so its shape is unknown")
    descriptor = int(found[1], 16)
    rows, columns = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
    in_shared = columns + (rows if operands.count("gdesc") == 2 else 0)
    use = _timed(
        form, rows * columns * DEPTH[form] // QUARTERS, chip, 1.0, in_shared * OPERAND_BYTES / QUARTERS / chip.shared
    )
    return replace(use, clocks=use.clocks * max(rows, LEAST_ROWS) / rows)


def _timed(form: str, work: int, chip: Chip, share: float, shared: float) -> Use:
    rate = getattr(chip.tensor, form) / QUARTERS * share
    if not rate:
        raise ConfigError(f"sm_{chip.sm} has no tensor cores for {form}")
    return Use(TENSOR, work / rate, shared, work)


def _bytes(opcode: str) -> int:
    """Bytes that an instruction moves per lane."""
    parts = opcode.split(".")
    if parts[0] in ("LDSM", "STSM"):
        matrices = parts[-1] if parts[-1] in ("2", "4") else "1"
        return 4 * int(matrices)
    for part in parts[1:]:
        if part in ("128", "64"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return 4  # a bank is four bytes wide
    return 4


def global_bytes(instruction: Instruction) -> int:
    """Bytes that a warp moves to or from global memory.

    The kernels move their tiles with 8 or 16 bytes per lane; narrower accesses are taken for one value for all lanes.
    """
    if instruction.name not in GLOBAL or instruction.predicate == "@!PT":
        return 0
    wide = _bytes(instruction.opcode)
    return wide * LANES if wide > 4 else SECTOR


def counts(instructions: Iterable[Instruction], chip: Chip, warps: int, brought: float = 0.0) -> dict[str, float]:
    """The clocks for which instructions of a program's warps occupy each pipe of a quarter, or `SHARED` of the SM, by
    name; `ISSUE` is their number in a quarter.

    Args:
        brought: Bytes that their bulk copies write to shared memory.
    """
    found = {SHARED: brought / chip.shared} if brought else {}
    for instruction in instructions:
        use, times = use_of(instruction, chip), _times(instruction, warps)
        issued = float(warps if instruction.issuers is None else len(instruction.issuers))
        for pipe, clocks in ((ISSUE, issued), (use.pipe, use.clocks * times), (SHARED, use.shared * times)):
            if pipe and clocks:
                found[pipe] = found.get(pipe, 0.0) + clocks / (1 if pipe == SHARED else QUARTERS)
    return found


def products(instructions: Iterable[Instruction], chip: Chip, warps: int) -> int:
    """The multiply-adds that the warps of one program do on tensor cores."""
    return sum(use_of(each, chip).work * _times(each, warps) for each in instructions)


def _times(instruction: Instruction, warps: int) -> int:
    """How often an instruction occupies what `use_of` says: once for each warp that executes it. But a product of
    tcgen05, which one thread begins for all, does so once in each quarter."""
    if TENSOR_MEMORY_MMA.match(instruction.opcode):
        return QUARTERS
    return warps if instruction.doers is None else len(instruction.doers)
