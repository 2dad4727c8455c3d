"""An SM that issues machine code: warps in order, pipes one instruction after the other, results after their latency.

The rules, which docs/kernels.md states as well:

- A quarter of the SM issues one instruction per clock, from the warp that has waited longest.
- A warp issues in order. After each instruction it waits the clocks that the assembler wrote beside it, and before one,
  for the scoreboards that it names.
- An instruction is issued when its pipe is free, and occupies it; `wgmma` and `tcgen05` queue up instead. Shared memory
  and L1 are one pipe of the whole SM.
- Loads from and stores to global memory are one pipe of the SM as well, at the rate that the SM gets of the L2 cache or
  DRAM while all SMs use it; data arrive after the latency.
- Scoreboards become free after the latency of shared memory, the special functions, the L2 cache or DRAM.
- A barrier holds each warp of a program until all have come; a wait for copies or for `wgmma` until they are done.
- Where copies arrive at mbarriers, a wait at one holds until the copies of all warps of the program have arrived there.

Left out: conflicts of register banks, and misses of the instruction cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import NamedTuple

from wanforge.runtime.measure.machine_code.disassembly import Instruction
from wanforge.runtime.measure.machine_code.pipes import PIPES, SHARED, TENSOR, global_bytes, use_of
from wanforge.runtime.measure.machine_code.rates import QUARTERS, Chip

PLAIN, ASYNC, ASYNC_ONCE, BARRIER = "plain", "product", "product for all", "barrier"
ASYNC_PART = "product with others of its group to come"
COPY, COMMIT, COPIES, PRODUCTS = "copy", "group of copies", "wait for copies", "wait for products"
ARRIVE, ARRIVALS = "arrival of copies", "wait for arrivals"
FAR = "global memory"
DEEPEST = 16
"""Groups in flight that are remembered."""

RELEASE = 8
"""Clocks from the last warp's arrival at a barrier to the first one's next instruction (assumed)."""
DRAIN = 20
"""Clocks from the end of a matrix product to its result (Luo: `wgmma` of the smallest shape takes 18 to 26)."""
OPERANDS = 12
"""Clocks after which a load or store has read its registers (assumed)."""
ROUNDS = 2, 5
"""A loop is run this many times; the difference is without its beginning and its end."""
CONSTANT = 30
"""Clocks of special registers and constants (assumed)."""


@dataclass(eq=False)
class Warp:
    """A warp: where it is, and what it waits for."""

    program: int
    is_first: bool
    place: int = 0
    free: list[float] = field(default_factory=lambda: [0.0] * 6)
    """When each scoreboard is free."""
    copies: float = 0.0
    """When the copies that belong to no group yet are there."""
    groups: list[float] = field(default_factory=list)
    """When each group of copies is there."""
    products: list[float] = field(default_factory=list)
    """When each group of asynchronous products is done."""
    arrivals: list[float] = field(default_factory=list)
    """When its copies have arrived at each mbarrier, in the order in which mbarriers are waited at."""
    waited: int = 0
    """How many mbarriers it has waited at."""


@dataclass(frozen=True)
class FarMemory:
    """The memory beyond an SM: clocks until data begin to arrive, and the bytes per clock that the SM gets of it."""

    latency: float
    bytes: float


class Issue(NamedTuple):
    """An instruction as the SM sees it, worked out once. `shared` and `far` are the clocks for which it occupies shared
    memory and the way to global memory besides its pipe."""

    kind: str
    pipe: str
    clocks: float
    shared: float
    far: float
    latency: float
    left: int
    stall: int
    waits: tuple[int, ...]
    writes: int | None
    reads: int | None


class Multiprocessor:
    """An SM with some programs of one kernel. Its quarters do the same, so one of them is run, with its share of what
    all of them use: a part of each program's warps, or a part of the programs where these have fewer warps than there
    are quarters.

    Args:
        memory: Where loads from global memory find their data.
        programs: Programs that it runs at a time.
        warps: Warps of one program, a power of two.
        ahead: Mbarriers at which copies have arrived before the first instruction.

    Attributes:
        sharing: Quarters that do the same as the one that is run.
        programs, warps: Those of this quarter.
    """

    def __init__(self, chip: Chip, memory: FarMemory, *, programs: int, warps: int, ahead: int = 0) -> None:
        self.chip, self.memory, self.ahead = chip, memory, ahead
        self.sharing = min(QUARTERS, programs * warps)
        self.programs = -(-programs * min(QUARTERS, warps) // QUARTERS)
        self.warps = max(1, warps // QUARTERS)

    def clocks(self, instructions: Sequence[Instruction], rounds: int, apart: float = 0.0) -> float:
        """Run the instructions `rounds` times over in every warp, and return the clocks until the last was issued.

        Args:
            apart: Clocks between the starts of the programs.
        """
        arrives = any(_is_arrival(each) for each in instructions)
        issues = [self._issue(each, arrives=arrives) for each in instructions]
        if not issues:
            return 0.0
        length, last, each = len(issues), len(issues) * rounds, self.warps
        free, done, pipes = 0.0, 0.0, dict.fromkeys((*PIPES, FAR, ""), 0.0)
        order = count()
        warps = [
            [Warp(program, number == 0, arrivals=[0.0] * self.ahead) for number in range(each)]
            for program in range(self.programs)
        ]
        waiting = [(warp.program * apart, next(order), warp) for program in warps for warp in program]
        met: list[list[Warp]] = [[] for _ in range(self.programs)]
        held: list[list[Warp]] = [[] for _ in range(self.programs)]
        while waiting:
            now, _, warp = waiting[0]
            issue = issues[warp.place % length]
            if issue.kind == ARRIVALS and any(len(each.arrivals) <= warp.waited for each in warps[warp.program]):
                heappop(waiting)
                held[warp.program].append(warp)
                continue
            ready = max(
                now, free, _arrived(issue, warp), 0.0 if issue.kind in (ASYNC, ASYNC_PART) else pipes[issue.pipe]
            )
            if issue.kind == ARRIVALS:
                ready = max(ready, *(each.arrivals[warp.waited] for each in warps[warp.program]))
            if ready > now:
                heapreplace(waiting, (ready, next(order), warp))
                continue
            done, free = now, now + 1
            _occupy(issue, warp, now, pipes)
            warp.place += 1
            if issue.kind == ARRIVE:
                while held[warp.program]:
                    heappush(waiting, (now, next(order), held[warp.program].pop()))
            if issue.kind == BARRIER:
                heappop(waiting)
                met[warp.program].append(warp)
                if len(met[warp.program]) == each:
                    for other in met[warp.program]:
                        if other.place < last:
                            heappush(waiting, (now + RELEASE, next(order), other))
                    met[warp.program] = []
            elif warp.place < last:
                heapreplace(waiting, (now + max(1, issue.stall), next(order), warp))
            else:
                heappop(waiting)
        return done

    def _issue(self, instruction: Instruction, *, arrives: bool) -> Issue:
        use, name, times = use_of(instruction, self.chip), instruction.name, self.chip.latency
        latency, kind, left = float(CONSTANT), PLAIN, 0
        if use.pipe == TENSOR:
            latency, kind = use.clocks + DRAIN, ASYNC if "GMMA" in name or name.startswith("UTC") else PLAIN
        elif name in ("LDG", "LDGSTS"):
            latency, kind = self.memory.latency, COPY if name == "LDGSTS" else PLAIN
        elif use.pipe:
            latency = times.shared if use.pipe == SHARED else times.xu
        elif name == "BAR" and "ARV" not in instruction.opcode:
            kind = BARRIER
        elif name == "LDGDEPBAR":
            kind = COMMIT
        elif name == "DEPBAR" and "SB0" in instruction.operands:
            kind, left = COPIES, _number(instruction)
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            kind, left = PRODUCTS, _number(instruction)
        elif _is_arrival(instruction):
            kind = ARRIVE
        elif instruction.opcode.startswith("SYNCS.PHASECHK"):
            kind = ARRIVALS if arrives else PRODUCTS
        if kind == ASYNC and name.startswith("UTC"):
            kind = ASYNC_ONCE
        elif kind == ASYNC and not instruction.operands.endswith("gsb0"):
            kind = ASYNC_PART
        return Issue(
            kind,
            use.pipe,
            use.clocks * (self.sharing if use.pipe == SHARED else 1),
            use.shared * self.sharing,
            global_bytes(instruction) / self.memory.bytes * self.sharing,
            latency,
            left,
            instruction.stall,
            instruction.waits,
            instruction.writes,
            instruction.reads,
        )


def outstanding(instructions: Sequence[Instruction]) -> int:
    """How many mbarriers at which copies arrive are waited at by other instructions than these."""
    waits = sum(each.opcode.startswith("SYNCS.PHASECHK") for each in instructions)
    return max(0, sum(map(_is_arrival, instructions)) - waits)


def _is_arrival(instruction: Instruction) -> bool:
    """Whether copies arrive at an mbarrier."""
    return instruction.opcode.startswith("ARRIVES.LDGSTSBAR")


def _number(instruction: Instruction) -> int:
    """How many of the latest groups a wait leaves in flight."""
    return int(instruction.operands.rpartition("0x")[2], 16)


def _arrived(issue: Issue, warp: Warp) -> float:
    """When what the instruction waits for is there."""
    ready = 0.0
    for number in issue.waits:
        ready = max(ready, warp.free[number])
    if issue.kind in (COPIES, PRODUCTS):
        groups = warp.groups if issue.kind == COPIES else warp.products
        if len(groups) > issue.left:
            ready = max(ready, groups[-1 - issue.left])
    return ready


def _occupy(issue: Issue, warp: Warp, now: float, pipes: dict[str, float]) -> None:
    """Note what the instruction takes, and when its result is there."""
    if issue.kind in (ASYNC, ASYNC_PART, ASYNC_ONCE):
        if issue.kind != ASYNC_ONCE or warp.is_first:  # one thread of a program issues a product of tcgen05 for all
            end = max(now, pipes[TENSOR]) + issue.clocks
            if issue.shared:
                pipes[SHARED] = max(now, pipes[SHARED]) + issue.shared
                end = max(end, pipes[SHARED])
            pipes[TENSOR] = end
        if issue.kind != ASYNC_PART:
            warp.products = [*warp.products[-DEEPEST:], pipes[TENSOR] + DRAIN]
        return
    if issue.pipe:
        pipes[issue.pipe] = now + issue.clocks
    arrival = now + issue.latency
    if issue.far:
        pipes[FAR] = max(now, pipes[FAR]) + issue.far
        arrival = pipes[FAR] + issue.latency
    if issue.kind == COPY:
        warp.copies = max(warp.copies, arrival)
    elif issue.kind == COMMIT:
        warp.groups = [*warp.groups[-DEEPEST:], warp.copies]
    elif issue.kind == ARRIVE:
        warp.arrivals.append(max(now, warp.copies))
    elif issue.kind == ARRIVALS:
        warp.waited += 1
    elif issue.writes is not None:
        warp.free[issue.writes] = max(warp.free[issue.writes], arrival)
    if issue.reads is not None:
        warp.free[issue.reads] = max(warp.free[issue.reads], now + issue.clocks + OPERANDS)


def steady_clocks(sm: Multiprocessor, instructions: Sequence[Instruction], alone: float) -> float:
    """Clocks of one round of a loop, of all programs together, once it runs evenly.

    Args:
        alone: The same for one program; the programs begin apart by its share.
    """
    few, many = (sm.clocks(instructions, rounds, alone / sm.programs) for rounds in ROUNDS)
    return (many - few) / (ROUNDS[1] - ROUNDS[0])
