"""What a compiled kernel takes on an SM, worked out from its machine code."""

from collections.abc import Sequence

from wanforge.configs.loading import Record
from wanforge.configs.targets import load_targets
from wanforge.errors import ConfigError
from wanforge.plugins.launching.cubins import Cubin
from wanforge.plugins.launching.occupancy import occupancy
from wanforge.runtime.measure.machine_code.disassembly import Instruction, disassemble
from wanforge.runtime.measure.machine_code.loops import outline
from wanforge.runtime.measure.machine_code.multiprocessor import (
    Memory,
    Multiprocessor,
    steady_clocks,
    through_clocks,
)
from wanforge.runtime.measure.machine_code.pipes import SHARED, counts, products
from wanforge.runtime.measure.machine_code.rates import QUARTERS, gpus_of, load_rates


class Part(Record, frozen=True):
    """A part of a kernel: what is executed once, or one iteration of a loop.

    Attributes:
        address: Where it begins in the machine code.
        pipes: Clocks for which one program occupies each pipe, the busiest first. `issue` are instructions.
        products: Multiply-adds that one program does on tensor cores.
        alone: Clocks of one program that has the SM to itself, with data in the L2 cache and from DRAM.
        together: Clocks of all programs that fit on the SM, while all are in this part, likewise.
    """

    address: int
    pipes: dict[str, float]
    products: int
    alone: tuple[float, float]
    together: tuple[float, float]

    def clocks(self, programs: int, most: int, *, from_dram: bool) -> float:
        """Clocks of some programs, at most as many as fit."""
        alone, together = self.alone[from_dram], self.together[from_dram]
        return alone if most == 1 else alone + (together - alone) * (programs - 1) / (most - 1)


class Profile(Record, frozen=True):
    """A kernel on a GPU.

    Attributes:
        programs: How many programs fit on an SM.
        parts: What is executed once, then each loop in the order of their addresses.
    """

    kernel: str
    gpu: str
    programs: int
    warps: int
    parts: list[Part]


def profiles(cubin: Cubin, code: bytes, gpus: Sequence[str] | None = None) -> dict[str, Profile]:
    """What a kernel takes on some GPUs of its architecture, by default all of them.

    Raises:
        ResourceError: The disassembler is missing, or does not accept the code.
        ConfigError: The kernel contains a loop inside a loop, or an instruction of unknown shape.
    """
    whole = outline(disassemble(code))
    if nested := [loop for outer in whole.inner for loop in outer.inner]:
        raise ConfigError(f"{cubin.kernel} for sm_{cubin.sm} has a loop inside a loop at {nested[0].address:#x}")
    pieces = [(part.address, part.instructions) for part in whole.walk()]
    return {gpu: _profile(cubin, pieces, gpu) for gpu in gpus or gpus_of(cubin.sm)}


def _profile(cubin: Cubin, pieces: Sequence[tuple[int, tuple[Instruction, ...]]], gpu: str) -> Profile:
    programs, warps = occupancy(cubin).programs, cubin.threads // 32
    machine, target = load_rates().gpus[gpu], load_targets()[gpu]
    chip = load_rates().chips[machine.chip]
    memories = (
        Memory(chip.latency.L2, machine.L2_bytes),
        Memory(chip.latency.DRAM, min(machine.L2_bytes, machine.dram_bytes(target))),
    )
    sms = [[Multiprocessor(chip, memory, programs=n, warps=warps) for memory in memories] for n in (1, programs)]
    parts = [_part(*piece, sms, is_loop=number > 0) for number, piece in enumerate(pieces)]
    return Profile(cubin.kernel, gpu, programs, warps, parts)


def _part(
    address: int, instructions: tuple[Instruction, ...], sms: Sequence[Sequence[Multiprocessor]], *, is_loop: bool
) -> Part:
    (near, far), full = sms
    chip, warps = near.chip, near.warps
    busy = {
        pipe: round(clocks * warps / (1 if pipe == SHARED else QUARTERS), 1)
        for pipe, clocks in counts(instructions, chip).items()
    }
    run = steady_clocks if is_loop else through_clocks
    alone = near_alone, far_alone = run(near, instructions, 0.0), run(far, instructions, 0.0)
    together = alone
    if full[0].programs > 1:
        together = run(full[0], instructions, near_alone), run(full[1], instructions, far_alone)
    return Part(
        address,
        dict(sorted(busy.items(), key=lambda item: -item[1])),
        products(instructions, chip, warps),
        (round(alone[0], 1), round(alone[1], 1)),
        (round(together[0], 1), round(together[1], 1)),
    )
