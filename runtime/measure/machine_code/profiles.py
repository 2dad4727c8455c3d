"""What a compiled kernel takes on an SM, worked out from its machine code."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from wanforge.configs.loading import Record
from wanforge.configs.targets import load_targets
from wanforge.errors import ConfigError
from wanforge.plugins.launching.cubins import Cubin
from wanforge.plugins.occupancy import occupancy
from wanforge.runtime.measure.machine_code.disassembly import Instruction, disassemble
from wanforge.runtime.measure.machine_code.loops import Loop, outline
from wanforge.runtime.measure.machine_code.multiprocessor import Multiprocessor
from wanforge.runtime.measure.machine_code.pipes import counts, global_bytes, products
from wanforge.runtime.measure.machine_code.rates import LANES, Chip, conflicts_of, load_rates
from wanforge.runtime.measure.machine_code.scripts import (
    FarMemory,
    Section,
    bulk_bytes,
    copied_ahead,
    doers_of,
    is_masked_copy,
)
from wanforge.runtime.measure.machine_code.threads import assigned


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
        programs: How many programs it has. If these are fewer than a GPU has SMs, each SM gets more of the DRAM's rate.
    """

    trips: tuple[int, ...]
    may_miss: tuple[bool, ...]
    bytes: float
    programs: int


@dataclass(frozen=True)
class Piece:
    """Instructions of a part of a kernel that are executed one after the other, or a loop around such pieces.

    Attributes:
        part: The number of the part that they belong to.
        trips: How often one iteration of the loop around them executes them, if they are a loop, which may be never;
            None if they are not.
        ahead: How many iterations ahead a loop copies, and in how many of its last ones it therefore copies nothing.
        inner: The pieces of a loop that has loops inside it, in place of instructions.
    """

    part: int
    instructions: tuple[Instruction, ...] = ()
    trips: int | None = None
    ahead: int = 0
    inner: tuple["Piece", ...] = ()

    @property
    def is_loop(self) -> bool:
        return self.trips is not None

    @property
    def warming(self) -> int:
        """Iterations before a loop runs evenly."""
        return 1 if self.inner else WARMING

    @property
    def rounds(self) -> int:
        """How often they are run. Of many iterations, so many that they tell how long more of them would take."""
        enough = self.warming + (2 if self.inner else STEADY + self.ahead)
        return 1 if self.trips is None else min(self.trips, enough)

    def walk(self) -> Iterator["Piece"]:
        """This piece and all inside it."""
        yield self
        for piece in self.inner:
            yield from piece.walk()

    def brought(self) -> float:
        """Bytes that the bulk copies of a program bring each time that the instructions are executed."""
        found = bulk_bytes(self.instructions).items()
        return sum(each.bytes * len(doers_of(self.instructions[place]) or ()) for place, each in found)

    def sections(self, memory: Sequence[FarMemory], *, is_last: bool = True) -> Iterator[Section]:
        """What is run, with the memory of each part. Only the last iterations of all copy nothing."""
        if not self.inner:
            yield Section(
                self.instructions, memory[self.part], self.rounds, min(self.ahead, self.rounds) if is_last else 0
            )
        for number in range(self.rounds if self.inner else 0):
            for piece in self.inner:
                yield from piece.sections(memory, is_last=is_last and number == self.rounds - 1)

    def measured(self, clock: "RoundClock", found: dict[int, list[list[float]]]) -> None:
        """Note the clocks of each iteration of each loop, every time that it is run."""
        clocks = []
        for _ in range(self.rounds):
            start = clock.now
            for piece in self.inner:
                piece.measured(clock, found)
            if not self.inner:
                clock.go_on()
            clocks.append(clock.now - start)
        if self.rounds and self.is_loop:
            found.setdefault(self.part, []).append(clocks)

    def steady(self, found: dict[int, list[list[float]]]) -> float:
        """Clocks of one iteration once the loop runs evenly, given those of each; of a loop that is run more than
        once, the second time; 0 of one that is never run."""
        runs = found.get(self.part, [])
        if not runs:
            return 0.0
        clocks = runs[min(1, len(runs) - 1)]
        last = len(clocks) - self._uneven(len(clocks), len(runs))
        even = clocks[min(self.warming, max(0, last - 1)) : last] or clocks
        return sum(even) / len(even)

    def _uneven(self, rounds: int, runs: int) -> int:
        """How many of the last rounds do not run as evenly as those before, of a loop that is run so many times.

        The last round of a loop with loops inside copies nothing ahead for another. An innermost loop copies nothing in
        its last rounds, but only the last time that it is run, and with three runs the second one is not the last.
        """
        if self.inner:
            return 1 if rounds > 2 else 0
        return self.ahead if runs < 3 else 0

    def own(self, found: dict[int, list[list[float]]], clocks: dict[int, float]) -> float:
        """Note the clocks of an iteration of a loop without those of the loops inside it, and return them with
        these."""
        steady = self.steady(found)
        clocks[self.part] = steady - sum(each.rounds * each.own(found, clocks) for each in self.inner if each.is_loop)
        return steady

    def bytes(self, warps: int, *, is_last: bool = True) -> float:
        """Bytes that the instructions of a program move from or to global memory."""
        times = 1 if self.trips is None else self.trips
        if not times:
            return 0.0
        brought, idle = bulk_bytes(self.instructions), self.ahead if is_last else 0
        inside = [
            (times - 1) * each.bytes(warps, is_last=False) + each.bytes(warps, is_last=is_last) for each in self.inner
        ]
        return sum(inside) + sum(
            (brought[place].bytes if place in brought else global_bytes(each))
            * (warps if doers_of(each) is None else len(doers_of(each) or ()))
            * (times - idle if is_masked_copy(each) else times)
            for place, each in enumerate(self.instructions)
        )


class RoundClock:
    """The time at which each round of a run ended, one after the other."""

    def __init__(self, ends: Iterable[float]) -> None:
        self.ends, self.now = iter(ends), 0.0

    def go_on(self) -> None:
        self.now = next(self.ends)


WARMING, STEADY = 4, 6
"""Iterations of a loop before it runs evenly, and those whose mean tells how long more of them would take."""


def pieces_of(whole: Loop, trips: Sequence[int]) -> tuple[Piece, ...]:
    """What a kernel executes, in order: its loops, and what stands between them. `trips` are the iterations of each
    loop that a program executes in all."""
    numbers = {loop.address: number for number, loop in enumerate(whole.walk())}
    executed = (1, *trips)

    def pieces(loop: Loop, before: tuple[Instruction, ...]) -> tuple[Piece, ...]:
        rest, found = list(loop.instructions), list[Piece]()
        for inner in loop.inner:
            first = tuple(each for each in rest if each.address < inner.address)
            rest, before = rest[len(first) :], before + first
            number = numbers[inner.address]
            times = executed[number] // max(1, executed[numbers[loop.address]])
            found.append(Piece(numbers[loop.address], first))
            if inner.inner:
                found.append(Piece(number, trips=times, inner=pieces(inner, before)))
            else:
                found.append(
                    Piece(number, inner.instructions, times, min(times, copied_ahead(before, inner.instructions)))
                )
            before = ()
        return (*found, Piece(numbers[loop.address], tuple(rest)))

    return pieces(whole, ())


def clocks_of(sm: Multiprocessor, pieces: Sequence[Piece], memory: Sequence[FarMemory], apart: float) -> list[float]:
    """Clocks of an iteration of each part of a kernel, without those of the loops inside it; what is executed once is
    given the rest of the run. `memory` is that of each part."""
    ends = sm.run([section for piece in pieces for section in piece.sections(memory)], apart)
    clock, found, clocks = RoundClock(ends), dict[int, list[list[float]]](), dict[int, float]()
    for piece in pieces:
        piece.measured(clock, found)
    loops = sum(piece.rounds * piece.own(found, clocks) for piece in pieces if piece.is_loop)
    clocks[0] = (ends[-1] if ends else 0.0) - loops
    return [round(clocks[number], 1) for number in range(len(memory))]


def profiles(cubin: Cubin, code: bytes, gpus: Sequence[str], usage: Usage) -> dict[str, Profile]:
    """What a kernel takes on some GPUs of its architecture, as a launch uses it.

    The machine code does not tell which warps load the same bytes. So what its instructions move is scaled to what the
    launch is known to move.

    Raises:
        ResourceError: The disassembler is missing, or does not accept the code.
        ConfigError: The kernel has more or fewer loops than were expected, or an instruction of unknown shape.
    """
    whole = outline(assigned(disassemble(code), cubin.threads))
    name = f"{cubin.kernel} for sm_{cubin.sm}"
    loops = list(whole.walk())[1:]
    if len(loops) != len(usage.trips):
        found = ", ".join(f"{loop.address:#x}" for loop in loops) or "none"
        raise ConfigError(
            f"{name} has loops at {found}, but {len(usage.trips)} were expected; correct the KernelRun of its launch "
            "in runtime/measure/cost/fused.py"
        )
    timer = KernelTimer(cubin, whole, usage)
    return {gpu: timer.profile(gpu) for gpu in gpus}


class KernelTimer:
    """Runs a kernel on the SMs of GPUs. What GPUs have in common is run once.

    What is executed once, the iterations of loops, and what follows them are one run, because the end of one overlaps
    with the beginning of the next. Of loops with many iterations, so many are run that they come to run evenly. A part
    that is a loop is then given what one of these takes, and what is executed once is given the rest of the run.

    Args:
        whole: The kernel.
        usage: What the launch says of it.
    """

    def __init__(self, cubin: Cubin, whole: Loop, usage: Usage) -> None:
        self.cubin, self.usage, self.parts = cubin, usage, list(whole.walk())
        self.programs, self.warps = occupancy(cubin).programs, cubin.threads // LANES
        self.pieces = pieces_of(whole, usage.trips)
        moved = sum(piece.bytes(self.warps) for piece in self.pieces)
        self.distinct = usage.bytes / moved if moved else 1.0
        self._known: dict[tuple[str, tuple[FarMemory, ...], int], list[float]] = {}

    def profile(self, gpu: str) -> Profile:
        """The kernel on a GPU."""
        chip = self._chip(load_rates().gpus[gpu].chip)
        near = [self._times(gpu, programs, from_dram=False) for programs in (1, self.programs)]
        far = [
            self._times(gpu, programs, from_dram=True) if any(self.usage.may_miss) else []
            for programs in (1, self.programs)
        ]

        def part(number: int) -> KernelPart:
            instructions = self.parts[number].instructions
            brought = sum(each.brought() for piece in self.pieces for each in piece.walk() if each.part == number)
            clocks = counts(instructions, chip, self.warps, brought)
            busy = {pipe: round(each, 1) for pipe, each in clocks.items()}
            ordered = dict(sorted(busy.items(), key=lambda item: -item[1]))
            alone, together = (
                (near[i][number], far[i][number] if self.usage.may_miss[number] else None) for i in range(2)
            )
            done = products(instructions, chip, self.warps)
            return KernelPart(self.parts[number].address, ordered, done, alone, together)

        return Profile(
            self.cubin.kernel,
            self.cubin.sha256,
            gpu,
            self.programs,
            self.warps,
            list(map(part, range(len(self.parts)))),
        )

    def _chip(self, name: str) -> Chip:
        """A kind of chip with the bank conflicts of this kernel."""
        conflicts = conflicts_of(self.cubin.kernel, self.cubin.sm)
        return msgspec.structs.replace(load_rates().chips[name], conflicts=conflicts)

    def _times(self, gpu: str, programs: int, *, from_dram: bool) -> list[float]:
        """Clocks of each part while so many programs run; with data from DRAM where a part may load them from there."""
        machine = load_rates().gpus[gpu]
        chip = self._chip(machine.chip)
        near = FarMemory(chip.latency.L2, machine.L2_bytes / self.distinct)
        share = max(1.0, machine.multiprocessors / self.usage.programs)
        dram = min(machine.L2_bytes, machine.dram_bytes(load_targets()[gpu]) * share)
        # While some programs are outside of their innermost loops, the others are in these, and leave DRAM to them.
        rates = [(machine.L2_bytes if part.inner else dram) / self.distinct for part in self.parts]
        memory = tuple(
            FarMemory(chip.latency.DRAM, rate) if from_dram and may_miss else near
            for rate, may_miss in zip(rates, self.usage.may_miss, strict=True)
        )
        key = machine.chip, memory, programs
        if key not in self._known:
            apart = 0.0
            if programs > 1 and self.usage.trips:
                apart = max(self._times(gpu, 1, from_dram=from_dram)[1:]) / programs
            sm = Multiprocessor(chip, programs=programs, warps=self.warps)
            self._known[key] = clocks_of(sm, self.pieces, memory, apart)
        return self._known[key]
