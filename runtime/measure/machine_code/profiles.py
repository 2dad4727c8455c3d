"""What a compiled kernel takes on an SM, worked out from its machine code."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from wanforge.configs.loading import Record
from wanforge.configs.targets import load_targets
from wanforge.errors import ConfigError
from wanforge.plugins.launching.cubins import Cubin
from wanforge.plugins.launching.occupancy import occupancy
from wanforge.runtime.measure.machine_code.disassembly import Instruction, disassemble
from wanforge.runtime.measure.machine_code.loops import outline
from wanforge.runtime.measure.machine_code.multiprocessor import (
    FarMemory,
    Multiprocessor,
    outstanding,
    steady_clocks,
)
from wanforge.runtime.measure.machine_code.pipes import SHARED, counts, global_bytes, products
from wanforge.runtime.measure.machine_code.rates import LANES, QUARTERS, Chip, conflicts_of, load_rates


class KernelPart(Record, frozen=True):
    """A part of a kernel: what is executed once, or one iteration of a loop.

    Attributes:
        address: Where it begins in the machine code.
        pipes: Clocks for which one program occupies each pipe, the busiest first. `issue` are instructions.
        products: Multiply-adds that one program does on tensor cores.
        alone: Clocks of one program that has the SM to itself, with data in the L2 cache, and from DRAM if asked for.
        together: Clocks of all programs that fit on the SM, while all are in this part, likewise.
    """

    address: int
    pipes: dict[str, float]
    products: int
    alone: tuple[float, float | None]
    together: tuple[float, float | None]

    def clocks(self, programs: int, most: int, *, from_dram: bool) -> float:
        """Clocks of some programs, at most as many as fit."""
        alone, together = self.alone[from_dram], self.together[from_dram]
        assert alone is not None
        assert together is not None
        return alone if most == 1 else alone + (together - alone) * (programs - 1) / (most - 1)


class Profile(Record, frozen=True):
    """A kernel on a GPU.

    Attributes:
        code: SHA-256 of the cubin.
        programs: How many programs fit on an SM.
        parts: What is executed once, then each loop in the order of their addresses.
    """

    kernel: str
    code: str
    gpu: str
    programs: int
    warps: int
    parts: list[KernelPart]


@dataclass(frozen=True)
class Usage:
    """What a launch says of its kernel.

    Attributes:
        trips: Iterations of each loop, in the order of the loops in the source.
        may_miss: For what is executed once and for each loop, whether it may load from DRAM.
        bytes: Bytes that one program moves from and to the L2 cache.
    """

    trips: tuple[int, ...]
    may_miss: tuple[bool, ...]
    bytes: float


@dataclass(frozen=True)
class Piece:
    """Instructions of a part, and whether they are run with data from DRAM as well."""

    address: int
    instructions: tuple[Instruction, ...]
    is_loop: bool
    from_dram: bool


def profiles(cubin: Cubin, code: bytes, gpus: Sequence[str], usage: Usage) -> dict[str, Profile]:
    """What a kernel takes on some GPUs of its architecture, as a launch uses it.

    The machine code does not tell which warps load the same bytes. So what its instructions move is scaled to what the
    launch is known to move.

    Raises:
        ResourceError: The disassembler is missing, or does not accept the code.
        ConfigError: The kernel has a loop inside a loop, more or fewer loops than were expected, or an instruction of
            unknown shape.
    """
    whole = outline(disassemble(code))
    name = f"{cubin.kernel} for sm_{cubin.sm}"
    if nested := [loop for outer in whole.inner for loop in outer.inner]:
        raise ConfigError(f"{name} has a loop inside a loop at {nested[0].address:#x}")
    parts = list(whole.walk())
    if len(parts) != len(usage.may_miss):
        found = ", ".join(f"{part.address:#x}" for part in parts[1:]) or "none"
        raise ConfigError(
            f"{name} has loops at {found}, but {len(usage.trips)} were expected; correct the KernelRun of its launch "
            "in runtime/measure/cost/fused.py"
        )
    pieces = [
        Piece(part.address, part.instructions, number > 0, may_miss)
        for number, (part, may_miss) in enumerate(zip(parts, usage.may_miss, strict=True))
    ]
    moved = sum(
        trips * sum(map(global_bytes, piece.instructions))
        for trips, piece in zip((1, *usage.trips), pieces, strict=True)
    )
    distinct = usage.bytes / (moved * cubin.threads / LANES) if moved else 1.0
    timer = KernelTimer(cubin, distinct, bool(whole.inner), outstanding(whole.instructions))
    return {gpu: timer.profile(gpu, pieces) for gpu in gpus}


class KernelTimer:
    """Runs the parts of a kernel on the SMs of GPUs. What GPUs have in common is run once.

    Args:
        distinct: Bytes that are moved for each byte that an instruction moves.
        ahead: How many mbarriers, at which copies arrive, the loop waits at before those of its own copies.
    """

    def __init__(self, cubin: Cubin, distinct: float, has_loops: bool, ahead: int) -> None:
        self.distinct, self.has_loops, self.ahead = distinct, has_loops, ahead
        self.cubin, self.programs, self.warps = cubin, occupancy(cubin).programs, cubin.threads // 32
        self._known: dict[tuple[int, str, FarMemory, int], float] = {}

    def profile(self, gpu: str, pieces: Iterable[Piece]) -> Profile:
        """The kernel on a GPU."""
        parts = [self._part(gpu, piece) for piece in pieces]
        return Profile(self.cubin.kernel, self.cubin.sha256, gpu, self.programs, self.warps, parts)

    def _part(self, gpu: str, piece: Piece) -> KernelPart:
        machine = load_rates().gpus[gpu]
        chip = self._chip(machine.chip)
        dram = min(machine.L2_bytes, machine.dram_bytes(load_targets()[gpu]))
        if self.has_loops and not piece.is_loop:
            # The other programs are in their loops meanwhile, and leave DRAM to those that begin or end.
            dram = machine.L2_bytes
        near = FarMemory(chip.latency.L2, machine.L2_bytes / self.distinct)
        far = FarMemory(chip.latency.DRAM, dram / self.distinct)

        def clocks(programs: int) -> tuple[float, float | None]:
            missed = self._clocks(machine.chip, far, programs, piece) if piece.from_dram else None
            return self._clocks(machine.chip, near, programs, piece), missed

        busy = {
            pipe: round(each * self.warps / (1 if pipe == SHARED else QUARTERS), 1)
            for pipe, each in counts(piece.instructions, chip).items()
        }
        ordered = dict(sorted(busy.items(), key=lambda item: -item[1]))
        return KernelPart(
            piece.address, ordered, products(piece.instructions, chip, self.warps), clocks(1), clocks(self.programs)
        )

    def _chip(self, name: str) -> Chip:
        """A kind of chip with the bank conflicts of this kernel."""
        conflicts = conflicts_of(self.cubin.kernel, self.cubin.sm)
        return msgspec.structs.replace(load_rates().chips[name], conflicts=conflicts)

    def _clocks(self, chip: str, memory: FarMemory, programs: int, piece: Piece) -> float:
        key = piece.address, chip, memory, programs
        if key not in self._known:
            ahead = self.ahead if piece.is_loop else 0
            sm = Multiprocessor(self._chip(chip), memory, programs=programs, warps=self.warps, ahead=ahead)
            if piece.is_loop:
                alone = self._clocks(chip, memory, 1, piece) if programs > 1 else 0.0
                self._known[key] = round(steady_clocks(sm, piece.instructions, alone), 1)
            else:
                self._known[key] = round(sm.clocks(piece.instructions, 1), 1)
        return self._known[key]
