"""Instructions for tests of the model of an SM."""

from wanforge.runtime.measure.machine_code.disassembly import Instruction


def instruction(
    text: str,
    *,
    stall: int = 1,
    waits: tuple[int, ...] = (),
    writes: int | None = None,
    reads: int | None = None,
    address: int = 0,
) -> Instruction:
    """An instruction as its opcode and operands, with what the assembler decided for its issue."""
    opcode, _, operands = text.partition(" ")
    return Instruction(address, "", opcode, operands, "", stall, waits, writes, reads)
