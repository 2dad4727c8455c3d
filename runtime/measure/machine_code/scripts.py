"""What a warp issues, worked out once for each instruction: what it occupies, waits for, and lets others wait for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wanforge.errors import ConfigError
from wanforge.runtime.measure.machine_code.disassembly import Instruction
from wanforge.runtime.measure.machine_code.pipes import (
    SHARED,
    TENSOR,
    TENSOR_MEMORY,
    Use,
    global_bytes,
    use_of,
)
from wanforge.runtime.measure.machine_code.rates import LANES, QUARTERS, Chip

PLAIN, ASYNC, ASYNC_PART = "plain", "product", "product with others of its group to come"
BARRIER, SIGNAL = "barrier", "arrival at a barrier"
QUEUED = {ASYNC, ASYNC_PART}
COPY, COMMIT, COPIES, PRODUCTS = "copy", "group of copies", "wait for copies", "wait for products"
BULK = "bulk copy"
ARRIVE, ARRIVE_COPIES, ARRIVE_PRODUCTS = "arrival", "arrival of copies", "arrival of products"
ARRIVALS = "wait for arrivals"
ARRIVING = BULK, ARRIVE, ARRIVE_COPIES, ARRIVE_PRODUCTS
COMMIT_PRODUCTS = "UTCBAR"
"""The instruction that lets products of `tcgen05` arrive at an mbarrier."""
BULK_COPIES = ("UTMALDG", "UBLKCP")
PRODUCTS_OF_ONE_THREAD = ("UTCIMMA", "UTCQMMA", "UTCHMMA")
OF_ONE_THREAD = (*BULK_COPIES, COMMIT_PRODUCTS, *PRODUCTS_OF_ONE_THREAD)
"""Instructions that one thread executes for its program: in the first warp, if the machine code does not tell where."""
BARRIER_OPERANDS = re.compile(r"(R\d+|0x[0-9a-f]+), (0x[0-9a-f]+)$")
"""The number of a barrier, and how many threads meet there."""
MASK = re.compile(r", !?U?P\d+$")
"""The last operand of a copy that may leave out what lies outside of a tensor."""
FAR = "global memory"

DRAIN = 20
"""Clocks from the end of a matrix product to its result (Luo: `wgmma` of the smallest shape takes 18 to 26)."""
OPERANDS = 12
"""Clocks after which a load or store has read its registers (assumed)."""
CONSTANT = 30.0
"""Clocks of special registers and constants (assumed)."""


@dataclass(frozen=True)
class Meeting:
    """A barrier as an instruction names it.

    Attributes:
        number: Its number; None if warpgroups take turns.
        warps: How many warps of a quarter have to come.
    """

    number: int | None
    warps: int

    def place(self, warpgroup: int, groups: int, *, waits: bool) -> tuple[str, int]:
        """Where a warp meets others. In turn, warpgroups wait at their own barrier, and arrive at that of the next."""
        if self.number is not None:
            return "barrier", self.number
        return "turn", (warpgroup + (not waits)) % groups


@dataclass(frozen=True)
class FarMemory:
    """The memory beyond an SM: clocks until data begin to arrive, and the bytes per clock that the SM gets of it."""

    latency: float
    bytes: float


@dataclass(frozen=True)
class Section:
    """Instructions that are executed one after the other, once or in a loop.

    Attributes:
        memory: Where their loads from global memory find their data.
        rounds: How often they are executed.
        idle: In how many of the last rounds nothing is copied, because earlier rounds have copied as far ahead.
    """

    instructions: Sequence[Instruction]
    memory: FarMemory
    rounds: int = 1
    idle: int = 0


class Issue(NamedTuple):
    """An instruction as a warp issues it, worked out once. `shared` and `far` are the clocks for which it occupies
    shared memory and the way to global memory besides its pipe; `arrives` tells whether it is an arrival at an
    mbarrier."""

    kind: str = PLAIN
    pipe: str = ""
    clocks: float = 0.0
    shared: float = 0.0
    far: float = 0.0
    latency: float = CONSTANT
    left: int = 0
    stall: int = 1
    waits: tuple[int, ...] = ()
    writes: int | None = None
    reads: int | None = None
    meeting: Meeting | None = None
    arrives: bool = False


class Quarter:
    """A quarter of an SM with its share of some programs of one kernel. All quarters do the same: each has a part of
    each program's warps, or a part of the programs where these have fewer warps than there are quarters. What only
    some warps of a warpgroup do is done by the one that this quarter has.

    Args:
        programs: Programs that the SM runs at a time.
        warps: Warps of one program, a power of two.

    Attributes:
        sharing: Quarters that do the same.
        group: Warps of a program that are in different quarters.
        programs, warps: Those of this quarter.
    """

    def __init__(self, chip: Chip, *, programs: int, warps: int) -> None:
        self.chip = chip
        self.sharing = min(QUARTERS, programs * warps)
        self.group = min(QUARTERS, warps)
        self.programs = -(-programs * self.group // QUARTERS)
        self.warps = max(1, warps // QUARTERS)

    def script(self, sections: Sequence[Section], number: int) -> tuple[list[Issue], list[int]]:
        """What the warp with this number issues, and where each round ends.

        Raises:
            ConfigError: Nothing tells how many bytes are copied, or which warps come to a barrier.
        """
        script: list[Issue] = []
        ends: list[int] = []
        counted = _counts_products(sections)
        for section in sections:
            brought = bulk_bytes(section.instructions)
            part = [
                (each, self._issue(each, number, brought.get(place), section.memory, counted=counted))
                for place, each in enumerate(section.instructions)
                if self._comes(each, number)
            ]
            busy, idle = [issue for _, issue in part], [_without_copy(each, issue) for each, issue in part]
            for round_ in range(section.rounds):
                script += busy if round_ < section.rounds - section.idle else idle
                ends.append(len(script))
        return script, ends

    def _comes(self, instruction: Instruction, number: int) -> bool:
        """Whether the warp with this number comes to an instruction. It does to a product of `tcgen05`, which it may
        wait for."""
        return self._share(instruction.issuers, number) > 0 or instruction.name in PRODUCTS_OF_ONE_THREAD

    def _share(self, warps: frozenset[int] | None, number: int) -> float:
        """The share of the warps of a warpgroup that some warps are."""
        if warps is None:
            return 1.0
        return sum(number * QUARTERS <= each < number * QUARTERS + self.group for each in warps) / self.group

    def _issue(
        self, instruction: Instruction, number: int, brought: "Brought | None", memory: FarMemory, *, counted: bool
    ) -> Issue:
        """An instruction as the warp with this number issues it."""
        use, share = use_of(instruction, self.chip), self._share(doers_of(instruction), number)
        issue = Issue(stall=instruction.stall, waits=instruction.waits)
        if not share and not _is_product_for_all(instruction):
            return issue
        issue = issue._replace(pipe=use.pipe, clocks=use.clocks, writes=instruction.writes, reads=instruction.reads)
        if use.pipe == TENSOR:
            return self._product(instruction, use, issue, share)
        if use.pipe:
            return self._move(instruction, issue, brought, memory, share * self.sharing)
        return self._wait(instruction, issue, counted=counted)

    def _product(self, instruction: Instruction, use: Use, issue: Issue, share: float) -> Issue:
        """A matrix product. Those of `tcgen05` are begun by one warp for all quarters, and may be waited for by all."""
        issue = issue._replace(latency=use.clocks + DRAIN, shared=use.shared * self.sharing * share)
        if _is_product_for_all(instruction):
            shared, clocks = (use.shared * self.sharing, use.clocks) if share else (0.0, 0.0)
            return issue._replace(kind=ASYNC, shared=shared, clocks=clocks)
        if "GMMA" not in instruction.name:
            return issue
        return issue._replace(kind=ASYNC if instruction.operands.endswith("gsb0") else ASYNC_PART)

    def _move(
        self, instruction: Instruction, issue: Issue, brought: "Brought | None", memory: FarMemory, warps: float
    ) -> Issue:
        """What occupies a pipe, maybe with data from or to global memory, in so many warps of the SM."""
        times, pipe = self.chip.latency, issue.pipe
        if brought is not None:
            moved, latency = brought.bytes * warps, memory.latency + times.bulk
            far, shared = moved / memory.bytes, moved / self.chip.shared
            return issue._replace(kind=BULK, latency=latency, far=far, shared=shared, arrives=brought.is_last)
        issue = issue._replace(far=global_bytes(instruction) * warps / memory.bytes)
        if pipe == SHARED:
            issue = issue._replace(clocks=issue.clocks * warps)
        if instruction.name in ("LDG", "LDGSTS"):
            return issue._replace(kind=COPY if instruction.name == "LDGSTS" else PLAIN, latency=memory.latency)
        if pipe == TENSOR_MEMORY:
            return issue._replace(latency=issue.clocks + times.shared)
        return issue._replace(latency=times.shared if pipe == SHARED else times.xu)

    def _wait(self, instruction: Instruction, issue: Issue, *, counted: bool) -> Issue:
        """What occupies no pipe: waits, arrivals, and the rest."""
        name, opcode = instruction.name, instruction.opcode
        if name == "BAR":
            kind, meeting = self._barrier(instruction)
            return issue._replace(kind=kind, meeting=meeting)
        if name == "LDGDEPBAR":
            return issue._replace(kind=COMMIT)
        if name == "DEPBAR" and "SB0" in instruction.operands:
            return issue._replace(kind=COPIES, left=_number(instruction))
        if opcode.startswith("WARPGROUP.DEPBAR"):
            return issue._replace(kind=PRODUCTS, left=_number(instruction))
        if opcode.startswith("SYNCS.PHASECHK"):
            return issue._replace(kind=ARRIVALS if counted else PRODUCTS)
        kind = kind_of_arrival(instruction)
        return issue._replace(kind=kind or PLAIN, arrives=bool(kind))

    def _barrier(self, instruction: Instruction) -> tuple[str, Meeting | None]:
        """What a warp does at a barrier, and which one that is.

        Raises:
            ConfigError: The machine code does not tell which warps do it.
        """
        kind = SIGNAL if "ARV" in instruction.opcode else BARRIER
        found = BARRIER_OPERANDS.match(instruction.operands)
        if found is None:
            return kind, Meeting(0, self.warps)
        warps = max(1, int(found[2], 16) // (LANES * QUARTERS))
        if not found[1].startswith("R"):
            if instruction.predicate:
                raise ConfigError(
                    f"{instruction.predicate} {instruction.opcode} {instruction.operands} is of some warps, and "
                    "nothing tells which; let the number of the barrier come from a register"
                )
            return kind, Meeting(int(found[1], 16), warps)
        if instruction.predicate:  # gives the first turn, which the first warpgroup has anyway, or takes the last
            return PLAIN, None
        return kind, Meeting(None, warps)


class Brought(NamedTuple):
    """The bytes of a bulk copy, and whether it is the last that arrives at its mbarrier."""

    bytes: float
    is_last: bool


def doers_of(instruction: Instruction) -> frozenset[int] | None:
    """The warps of a program that execute an instruction; None for all."""
    is_known = instruction.doers is not None
    return frozenset({0}) if instruction.name in OF_ONE_THREAD and not is_known else instruction.doers


def _is_product_for_all(instruction: Instruction) -> bool:
    """Whether one thread begins a product for its program."""
    return instruction.name in PRODUCTS_OF_ONE_THREAD


def _without_copy(instruction: Instruction, issue: Issue) -> Issue:
    """An instruction that copies nothing, if it copies only what its kernel still needs. What would arrive at an
    mbarrier has arrived."""
    if not is_masked_copy(instruction):
        return issue
    return Issue(BULK if issue.kind == BULK else PLAIN, stall=issue.stall, waits=issue.waits, arrives=issue.arrives)


def is_masked_copy(instruction: Instruction) -> bool:
    """Whether an instruction copies only what its kernel still needs."""
    is_masked = bool(instruction.predicate or MASK.search(instruction.operands))
    return instruction.name in BULK_COPIES or (instruction.name == "LDGSTS" and is_masked)


def announcements(instructions: Sequence[Instruction]) -> list[tuple[int, list[int]]]:
    """The bytes that are expected at each mbarrier, and the places of the bulk copies that bring them, which come after
    that and before the next.

    Raises:
        ConfigError: The machine code does not tell how many bytes a copy brings.
    """
    found: list[tuple[int, list[int]]] = []
    for place, each in enumerate(instructions):
        if each.expected:
            found.append((each.expected, []))
        elif each.name in BULK_COPIES and found:
            found[-1][1].append(place)
        elif each.name in BULK_COPIES:
            raise ConfigError(
                f"a bulk copy at {each.address:#x} arrives at an mbarrier at which no constant number of bytes was "
                "announced; announce them before it"
            )
    return found


def bulk_bytes(instructions: Sequence[Instruction]) -> dict[int, Brought]:
    """What each bulk copy brings, by its place: an equal part of the bytes that are expected where it arrives.

    Raises:
        ConfigError: The machine code does not tell how many bytes these are.
    """
    return {
        place: Brought(expected / len(places), place == places[-1])
        for expected, places in announcements(instructions)
        for place in places
    }


def copied_ahead(before: Sequence[Instruction], loop: Sequence[Instruction]) -> int:
    """How many iterations ahead a loop copies: as many as were copied before it began, by arrivals at mbarriers or by
    groups of copies that are waited for in order. Bulk copies of other bytes are for something else."""
    announced = [expected for expected, _ in announcements(loop)]

    def arrivals(instructions: Sequence[Instruction]) -> int:
        own = sum(kind_of_arrival(each) == ARRIVE_COPIES for each in instructions)
        return own + sum(expected in announced for expected, _ in announcements(instructions))

    def groups(instructions: Sequence[Instruction]) -> int:
        return sum(each.name == "LDGDEPBAR" for each in instructions)

    return next((count(before) // count(loop) for count in (arrivals, groups) if count(loop)), 0)


def kind_of_arrival(instruction: Instruction) -> str:
    """What arrives at an mbarrier where an instruction stands; empty if nothing does, or not yet."""
    if instruction.opcode.startswith("ARRIVES.LDGSTSBAR"):
        return ARRIVE_COPIES
    if instruction.name == COMMIT_PRODUCTS:
        return ARRIVE_PRODUCTS
    return ARRIVE if instruction.opcode.startswith("SYNCS.ARRIVE") and not instruction.expected else ""


def _counts_products(sections: Sequence[Section]) -> bool:
    """Whether waits at mbarriers are for what arrives there, one after the other. If there are more waits than products
    that arrive, each wait is taken for one for all of them."""
    every = [(each, section.rounds) for section in sections for each in section.instructions]
    kinds = {kind_of_arrival(each) for each, _ in every} | {BULK for each, _ in every if each.name in BULK_COPIES}
    arrivals = sum(rounds for each, rounds in every if kind_of_arrival(each) == ARRIVE_PRODUCTS)
    waits = sum(rounds for each, rounds in every if each.opcode.startswith("SYNCS.PHASECHK"))
    return arrivals >= waits if ARRIVE_PRODUCTS in kinds else bool(kinds & set(ARRIVING))


def _number(instruction: Instruction) -> int:
    """How many of the latest groups a wait leaves in flight."""
    return int(instruction.operands.rpartition("0x")[2], 16)
