"""Machine code as instructions, read with the disassembler that comes with Triton.

Each instruction carries what the assembler decided for its issue: the clocks that its warp waits afterwards, and the
scoreboards that it waits for, or that tell when it has read its operands and written its result. Source: Jia et al.,
"Dissecting the NVIDIA Volta GPU architecture via microbenchmarking" (arXiv:1804.06826), section 2.1.
"""

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from wanforge.errors import ResourceError
from wanforge.requirements import install_package
from wanforge.whole_file import temporary_folder

FIRST = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
"""An address, an instruction, and the lower half of its code; the upper half is on the next line."""
SECOND = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"([.$]\S+):")
PARTS = re.compile(r"(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*)", re.DOTALL)
TARGET = re.compile(r"`\(([^)]+)\)")
DESCRIPTOR = re.compile(r"idesc\[(UR\d+)\]")
CONSTANT = re.compile(r"(UR\d+), (0x[0-9a-f]+)$")
WRITTEN = re.compile(r"UR\d+")

CONTROL_SHIFT = 41
NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel.

    Attributes:
        predicate: The predicate that it is executed under, such as ``@!P0``; empty if it is always executed.
        opcode: With its modifiers, such as ``IMMA.16832.S8.S8.SAT``.
        target: The label that it branches to; empty if it does not branch.
        stall: Clocks after which the warp may issue its next instruction.
        waits: The scoreboards that must be free before it is issued.
        writes: The scoreboard that becomes free once the result is there; None if the result needs none.
        reads: The same for its operands.
        issuers: The warps of a program that issue it; None for all of them. `threads` works this out.
        doers: The issuers for which its predicate may hold; None for all.
        expected: Bytes of bulk copies that it announces at an mbarrier; 0 if there are none, or nothing tells how many.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    target: str
    stall: int
    waits: tuple[int, ...]
    writes: int | None
    reads: int | None
    issuers: frozenset[int] | None = None
    doers: frozenset[int] | None = None
    expected: int = 0

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class MachineCode:
    """The instructions of a kernel in the order of their addresses, and the labels by the address they stand at."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def disassemble(code: bytes) -> MachineCode:
    """Read a cubin with one kernel.

    Raises:
        ResourceError: Triton is not installed, or its disassembler does not accept the cubin.
    """
    program = disassembler()
    with temporary_folder() as folder:
        path = folder / "kernel.cubin"
        path.write_bytes(code)
        done = subprocess.run([program, "-c", "-ndf", "-hex", path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ResourceError(f"{program} does not accept the machine code: {done.stderr.strip()}")
    return parse(done.stdout)


def disassembler() -> Path:
    """The disassembler in Triton's package, which is found without importing it.

    Raises:
        ResourceError: Triton is not installed.
    """
    found = find_spec("triton")
    folders = (found.submodule_search_locations or []) if found else []
    for folder in folders:
        program = Path(folder, "backends", "nvidia", "bin", "nvdisasm")
        if program.is_file():
            return program
    raise ResourceError(
        "reading machine code needs the disassembler that comes with triton, which is not installed; "
        f"run: {install_package('triton')}"
    )


def parse(text: str) -> MachineCode:
    """Read what ``nvdisasm -hex`` prints for one kernel.

    Raises:
        ResourceError: There is no instruction in it.
    """
    lines = text.splitlines()
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if label := LABEL.match(line):
            waiting.append(label[1])
        elif (first := FIRST.match(line)) and (second := SECOND.match(following)):
            instruction = _instruction(int(first[1], 16), first[2], int(second[1], 16))
            labels |= dict.fromkeys(waiting, instruction.address)
            waiting = []
            instructions.append(instruction)
    if not instructions:
        raise ResourceError("the disassembler prints no instructions; is this a cubin with one kernel?")
    return MachineCode(tuple(_described(instructions)), labels)


def _described(instructions: Iterable[Instruction]) -> Iterator[Instruction]:
    """The same, with the descriptor of each product of tcgen05, which tells its shape, in place of the register that
    holds it: the constant that was moved there last."""
    constants: dict[str, str] = {}
    for each in instructions:
        if written := WRITTEN.match(each.operands):
            constants.pop(written[0], None)
        if each.name == "UMOV" and (moved := CONSTANT.match(each.operands)):
            constants[moved[1]] = moved[2]
        if (found := DESCRIPTOR.search(each.operands)) and found[1] in constants:
            yield replace(each, operands=each.operands.replace(found[0], f"idesc[{constants[found[1]]}]"))
        else:
            yield each


def _instruction(address: int, text: str, upper: int) -> Instruction:
    parts = PARTS.match(text)
    assert parts is not None
    target = TARGET.search(parts[3])
    control = upper >> CONTROL_SHIFT
    writes, reads = control >> 5 & 7, control >> 8 & 7
    return Instruction(
        address,
        parts[1] or "",
        parts[2].rstrip(";"),
        parts[3].strip(" ;"),
        target[1] if target else "",
        control & 15,
        tuple(number for number in range(6) if control >> (11 + number) & 1),
        None if writes == NO_SCOREBOARD else writes,
        None if reads == NO_SCOREBOARD else reads,
    )
