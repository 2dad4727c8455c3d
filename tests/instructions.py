"""Instructions for tests of the model of an SM."""

from wanforge.runtime.measure.machine_code.disassembly import Instruction, MachineCode


def instruction(
    text: str,
    *,
    stall: int = 1,
    waits: tuple[int, ...] = (),
    writes: int | None = None,
    reads: int | None = None,
    address: int = 0,
    predicate: str = "",
    issuers: frozenset[int] | None = None,
    doers: frozenset[int] | None = None,
    expected: int = 0,
) -> Instruction:
    """An instruction as its opcode and operands, what the assembler decided for its issue, and the warps that do it."""
    opcode, _, operands = text.partition(" ")
    return Instruction(address, predicate, opcode, operands, "", stall, waits, writes, reads, issuers, doers, expected)


def listing(*lines: str) -> MachineCode:
    """Instructions, and labels that end in a colon. A predicate comes first, a branch's label last."""
    instructions, labels = [], {}
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
            continue
        predicate, _, rest = line.rpartition("@")[2].partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        target = operands if opcode.startswith(("BRA", "CALL")) else ""
        instructions.append(
            Instruction(
                len(instructions), f"@{predicate}" * bool(predicate), opcode, operands, target, 1, (), None, None
            )
        )
    return MachineCode(tuple(instructions), labels)
