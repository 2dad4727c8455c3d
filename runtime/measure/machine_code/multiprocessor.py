"""An SM that issues machine code: warps in order, pipes one instruction after the other, results after their latency.

The rules, which docs/kernels.md states as well:

- A quarter of the SM issues one instruction per clock, from the warp that has waited longest.
- A warp issues in order. After each instruction it waits the clocks that the assembler wrote beside it, and before one,
  for the scoreboards that it names.
- An instruction is issued when its pipe is free, and occupies it; `wgmma` and `tcgen05` queue up instead. Shared memory
  and L1 are one pipe of the whole SM.
- Scoreboards become free after the latency of shared memory, the special functions, the L2 cache or DRAM.
- A barrier holds each warp of a program until all have come. A wait for copies or for `wgmma` holds until they are done.

Left out: conflicts of register banks, misses of the instruction cache, and that loads queue up in the L2 cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from wanforge.runtime.measure.machine_code.disassembly import Instruction
from wanforge.runtime.measure.machine_code.pipes import SHARED, TENSOR, Use, use_of
from wanforge.runtime.measure.machine_code.rates import LANES, QUARTERS, Chip

BARRIER = 8
"""Clocks from the last warp's arrival at a barrier to the first one's next instruction (assumed)."""
DRAIN = 20
"""Clocks from the end of a matrix product to its result (Luo: `wgmma` of the smallest shape takes 18 to 26)."""
OPERANDS = 12
"""Clocks after which a load or store has read its registers (assumed)."""
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


class Multiprocessor:
    """An SM with some programs of one kernel.

    Args:
        programs: Programs that it runs at a time.
        warps: Warps of one program.
        is_cached: Whether loads from global memory find their data in the L2 cache.
    """

    def __init__(self, chip: Chip, *, programs: int, warps: int, is_cached: bool = True) -> None:
        self.chip, self.programs, self.warps = chip, programs, warps
        self.global_latency = chip.latency.L2 if is_cached else chip.latency.DRAM

    def clocks(self, instructions: Sequence[Instruction], rounds: int, *, apart: float = 0.0) -> list[float]:
        """Run the instructions several times over in every warp.

        Args:
            apart: Clocks between the starts of the programs.

        Returns:
            When the last warp had issued all instructions of each round, in clocks.
        """
        steps = [self._step(each) for each in instructions]
        if not steps:
            return [0.0] * rounds
        done, length = [0.0] * rounds, len(steps)
        issue, pipes = [0.0] * QUARTERS, [dict[str, float]() for _ in range(QUARTERS)]
        memory = {SHARED: 0.0}
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
            if warp.place % length == 0:
                turn = warp.place // length - 1
                done[turn] = max(done[turn], now)
            if warp.place == rounds * length:
                if step.kind != "barrier":
                    continue
            if step.kind == "barrier":
                met = at_barrier.setdefault(warp.program, [])
                met.append(warp)
                if len(met) == self.warps:
                    for other in met:
                        if other.place < rounds * length:
                            order += 1
                            heappush(waiting, (now + BARRIER, order, other))
                    met.clear()
                continue
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
            latency, kind = self.global_latency, "copy" if name == "LDGSTS" else "plain"
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
        return Step(instruction, kind, use, latency, left)

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
        if step.kind == "copy":
            warp.copies = max(warp.copies, now + step.latency)
        elif step.kind == "commit":
            warp.groups = [*warp.groups[-8:], warp.copies]
        if instruction.writes is not None and step.kind != "commit":
            warp.free[instruction.writes] = max(warp.free[instruction.writes], now + step.latency)
        if instruction.reads is not None:
            warp.free[instruction.reads] = max(warp.free[instruction.reads], now + use.clocks + OPERANDS)


def steady_clocks(sm: Multiprocessor, instructions: Sequence[Instruction], rounds: int = 4) -> float:
    """Clocks of one round of a loop, of all programs together, once it runs evenly. The programs begin apart."""
    if not instructions:
        return 0.0
    alone = Multiprocessor(sm.chip, programs=1, warps=sm.warps)
    alone.global_latency = sm.global_latency
    times = alone.clocks(instructions, rounds)
    one = (times[-1] - times[0]) / (rounds - 1)
    if sm.programs == 1:
        return one
    times = sm.clocks(instructions, rounds, apart=one / sm.programs)
    return (times[-1] - times[0]) / (rounds - 1)


def through_clocks(sm: Multiprocessor, instructions: Sequence[Instruction]) -> float:
    """Clocks of going through instructions once, until the last result is there, of all programs together."""
    return sm.clocks(instructions, 1)[0] if instructions else 0.0


assert LANES
