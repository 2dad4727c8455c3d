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
- A barrier holds each warp of a program until all have come. A wait for copies or for `wgmma` holds until they are done.

Left out: conflicts of register banks, and misses of the instruction cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from wanforge.runtime.measure.machine_code.disassembly import Instruction
from wanforge.runtime.measure.machine_code.pipes import SHARED, TENSOR, Use, global_bytes, use_of
from wanforge.runtime.measure.machine_code.rates import QUARTERS, Chip

FAR = "memory"

BARRIER = 8
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
    number: int
    quarter: int
    place: int = 0
    free: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies: float = 0.0
    """When the copies that belong to no group yet are there."""
    groups: list[float] = field(default_factory=list)
    """When each group of copies is there."""
    products: list[float] = field(default_factory=list)
    """When each group of asynchronous products is done."""
    product: float = 0.0


@dataclass(frozen=True)
class Step:
    """An instruction as the SM sees it, worked out once."""

    instruction: Instruction
    kind: str
    use: Use
    latency: float
    left: int
    """How many of the latest groups a wait leaves in flight."""
    bytes: int
    """What the warp moves to or from global memory."""


@dataclass(frozen=True)
class Memory:
    """The memory beyond an SM: clocks until data begin to arrive, and the bytes per clock that the SM gets of it."""

    latency: float
    bytes: float


class Multiprocessor:
    """An SM with some programs of one kernel.

    Args:
        programs: Programs that it runs at a time.
        warps: Warps of one program.
        memory: Where loads from global memory find their data.
    """

    def __init__(self, chip: Chip, memory: Memory, *, programs: int, warps: int) -> None:
        self.chip, self.memory, self.programs, self.warps = chip, memory, programs, warps

    def clocks(self, instructions: Sequence[Instruction], rounds: int, apart: float = 0.0) -> float:
        """Run the instructions `rounds` times over in every warp, and return the clocks until the last was issued.

        Args:
            apart: Clocks between the starts of the programs.
        """
        steps = [self._step(each) for each in instructions]
        if not steps:
            return 0.0
        done, length = 0.0, len(steps)
        issue, pipes = [0.0] * QUARTERS, [dict[str, float]() for _ in range(QUARTERS)]
        memory = {SHARED: 0.0, FAR: 0.0}
        waiting: list[tuple[float, int, Warp]] = []
        at_barrier: dict[int, list[Warp]] = {}
        order = 0
        for program in range(self.programs):
            for number in range(self.warps):
                warp = Warp(program, number, (program * self.warps + number) % QUARTERS)
                heappush(waiting, (program * apart, order, warp))
                order += 1
        while waiting:
            now, _, warp = heappop(waiting)
            step = steps[warp.place % length]
            use = step.use
            pipe = memory if use.pipe == SHARED else pipes[warp.quarter]
            ready = max(now, self._ready(step, warp), issue[warp.quarter])
            if use.pipe and step.kind != "async":
                ready = max(ready, pipe.get(use.pipe, 0.0))
            order += 1
            if ready > now:
                heappush(waiting, (ready, order, warp))
                continue
            issue[warp.quarter] = now + 1
            self._occupy(step, warp, now, pipe, memory)
            warp.place += 1
            done = now
            if step.kind == "barrier":
                met = at_barrier.setdefault(warp.program, [])
                met.append(warp)
                if len(met) == self.warps:
                    for other in met:
                        if other.place < rounds * length:
                            order += 1
                            heappush(waiting, (now + BARRIER, order, other))
                    met.clear()
            elif warp.place < rounds * length:
                heappush(waiting, (now + max(1, step.instruction.stall), order, warp))
        return done

    def _step(self, instruction: Instruction) -> Step:
        use, name = use_of(instruction, self.chip), instruction.name
        latency, kind, left = float(CONSTANT), "plain", 0
        times = self.chip.latency
        if use.pipe == TENSOR:
            latency = use.clocks + DRAIN
            kind = "async" if "GMMA" in name or name.startswith("UTC") else "plain"
        elif name in ("LDG", "LDGSTS"):
            latency, kind = self.memory.latency, "copy" if name == "LDGSTS" else "plain"
        elif use.pipe == SHARED:
            latency = times.shared
        elif use.pipe in ("xu", "alu", "fma", "imad", "uniform"):
            latency = times.xu
        elif name == "BAR" and "ARV" not in instruction.opcode:
            kind = "barrier"
        elif name == "LDGDEPBAR":
            kind = "commit"
        elif name == "DEPBAR" and "SB0" in instruction.operands:
            kind, left = "copies", int(instruction.operands.rpartition("0x")[2] or "0", 16)
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            kind, left = "products", int(instruction.operands.rpartition("0x")[2] or "0", 16)
        elif instruction.opcode.startswith("SYNCS.PHASECHK"):
            kind = "products"
        return Step(instruction, kind, use, latency, left, global_bytes(instruction))

    @staticmethod
    def _ready(step: Step, warp: Warp) -> float:
        """When what the instruction waits for is there."""
        ready = 0.0
        for number in step.instruction.waits:
            ready = max(ready, warp.free[number])
        if step.kind == "copies" and len(warp.groups) > step.left:
            ready = max(ready, warp.groups[len(warp.groups) - 1 - step.left])
        if step.kind == "products" and len(warp.products) > step.left:
            ready = max(ready, warp.products[len(warp.products) - 1 - step.left])
        return ready

    def _occupy(self, step: Step, warp: Warp, now: float, pipe: dict[str, float], memory: dict[str, float]) -> None:
        """Note what the instruction takes, and when its result is there."""
        use, instruction = step.use, step.instruction
        end = now
        if step.kind == "async":
            if instruction.name.startswith("UTC") and warp.number:
                return  # one thread of the program issues it for all
            end = max(now, pipe.get(TENSOR, 0.0)) + use.clocks
            if use.shared:
                memory[SHARED] = max(now, memory[SHARED]) + use.shared
                end = max(end, memory[SHARED])
            pipe[TENSOR] = end
            warp.product = max(warp.product, end + DRAIN)
            if "gsb0" in instruction.operands or instruction.name.startswith("UTC"):
                warp.products = [*warp.products[-8:], warp.product]
            return
        if use.pipe:
            pipe[use.pipe] = now + use.clocks
        arrival = now + step.latency
        if step.bytes:
            memory[FAR] = max(now, memory[FAR]) + step.bytes / self.memory.bytes
            arrival = memory[FAR] + step.latency
        if step.kind == "copy":
            warp.copies = max(warp.copies, arrival)
        elif step.kind == "commit":
            warp.groups = [*warp.groups[-8:], warp.copies]
        if instruction.writes is not None and step.kind != "commit":
            warp.free[instruction.writes] = max(warp.free[instruction.writes], arrival)
        if instruction.reads is not None:
            warp.free[instruction.reads] = max(warp.free[instruction.reads], now + use.clocks + OPERANDS)


def steady_clocks(sm: Multiprocessor, instructions: Sequence[Instruction], alone: float) -> float:
    """Clocks of one round of a loop, of all programs together, once it runs evenly.

    Args:
        alone: The same for one program; the programs begin apart by its share.
    """
    few, many = (sm.clocks(instructions, rounds, alone / sm.programs) for rounds in ROUNDS)
    return (many - few) / (ROUNDS[1] - ROUNDS[0])


def through_clocks(sm: Multiprocessor, instructions: Sequence[Instruction], alone: float) -> float:
    """Clocks of going through instructions once, all programs at a time."""
    return sm.clocks(instructions, 1)
