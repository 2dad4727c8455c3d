"""Which warps of a program execute an instruction, as far as this follows from the numbers of their threads.

A bulk copy of a tile, or a product of `tcgen05`, is begun by one thread for all, which compares its number with a
constant, or is elected (`ELECT`). So the integer instructions that lead from the number of a thread to a predicate are
computed here, for every thread; what comes from memory, or from a parameter, is unknown. A predicate that is unknown
may hold.

Instructions are run in the order of their addresses, and joins of paths are not followed: where a block that some
threads skip writes a register, all threads are taken to hold what it wrote.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from wanforge.runtime.measure.machine_code.disassembly import Instruction, MachineCode
from wanforge.runtime.measure.machine_code.loops import BasicBlock, basic_blocks, outline
from wanforge.runtime.measure.machine_code.pipes import GROUP_MMA
from wanforge.runtime.measure.machine_code.rates import LANES

Values = NDArray[np.float64]
"""A number for every thread of a program, or of a predicate 0 or 1; not a number where it is unknown."""
REGISTER = re.compile(r"(U?R)(\d+)")
PREDICATE = re.compile(r"U?PT?\d*$")
BRANCHES_BY = re.compile(r"!?U?P\d+")
WORD = 0xFFFFFFFF
COMPARED: dict[str, Callable[[Values, Values], NDArray[np.bool_]]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
NOTHING_WRITTEN = {"BAR", "BRA", "EXIT", "RET", "CALL", "STG", "STS", "STL", "NOP", "WARPSYNC", "BSYNC", "BSSY"}


def assigned(code: MachineCode, threads: int) -> MachineCode:
    """A kernel with the warps that issue and execute each instruction, where these are not all warps of a program, and
    with the bytes that it expects at mbarriers."""
    running = Threads(threads)
    again = _written_again(code)
    holds: dict[int, Values] = {}
    expected: dict[int, int] = {}
    for each in code.instructions:
        running.forget(again.get(each.address, ()))
        holds[each.address] = running.holds(each)
        if each.opcode.startswith("SYNCS.ARRIVE.TRANS64"):
            count = running.value(_operands(each)[-1])[holds[each.address] != 0]
            expected[each.address] = int(np.nanmax(count)) if np.any(~np.isnan(count)) else 0
        running.run(each)
    found: dict[int, Instruction] = {}
    for block, come in _reached(basic_blocks(code), holds, threads).items():
        for each in block.instructions:
            doers, count = _warps(come & (holds[each.address] != 0)), expected.get(each.address, 0)
            found[each.address] = replace(each, issuers=_warps(come), doers=doers, expected=count)
    return MachineCode(tuple(found.get(each.address, each) for each in code.instructions), code.labels)


def _warps(threads: NDArray[np.bool_]) -> frozenset[int] | None:
    """The warps of some threads; None if these are all warps."""
    warps = threads.reshape(-1, LANES).any(1)
    return None if warps.all() else frozenset(map(int, np.flatnonzero(warps)))


def _reached(blocks: list[BasicBlock], holds: dict[int, Values], threads: int) -> dict[BasicBlock, NDArray[np.bool_]]:
    """The threads that come to each block."""
    come = {block: np.zeros(threads, bool) for block in blocks}
    come[blocks[0]][:] = True
    waiting = [blocks[0]]
    while waiting:
        block = waiting.pop()
        last = block.instructions[-1]
        branch = holds[last.address]
        goes_on = last.name not in ("BRA", "EXIT")
        for number, follower in enumerate(block.followers):
            is_target = last.name == "BRA" and number == 0
            takes = np.ones(threads, bool) if goes_on else branch != 0 if is_target else branch != 1
            more = come[block] & takes & ~come[follower]
            if more.any():
                come[follower] |= more
                waiting.append(follower)
    return come


def _written_again(code: MachineCode) -> dict[int, set[str]]:
    """By the address at which a loop begins, the registers that are written in it: what they held before tells
    nothing."""
    return {
        loop.address: {name for part in loop.walk() for each in part.instructions for name in _written(each)}
        for outer in outline(code).inner
        for loop in outer.walk()
    }


def _operands(instruction: Instruction) -> list[str]:
    return [each.strip().removesuffix(".reuse") for each in instruction.operands.split(",")]


def _written(instruction: Instruction) -> Iterator[str]:
    """The registers and predicates that an instruction may write."""
    if instruction.name in NOTHING_WRITTEN:
        return
    operands = _operands(instruction)
    for operand in operands[:2] if instruction.name.endswith(("SETP", "PLOP3")) else operands:
        if register := REGISTER.fullmatch(operand):
            first = int(register[2])
            yield from (f"{register[1]}{first + i}" for i in range(_width(instruction.opcode)))
            return
        if not PREDICATE.match(operand):
            return
        yield operand


def _width(opcode: str) -> int:
    """At most so many registers are written side by side."""
    name, *parts = opcode.split(".")
    if match := GROUP_MMA.match(opcode):
        return int(match["n"]) // 2
    if name == "LDTM":
        return 128
    if "128" in parts or "MMA" in name or name == "LDSM":
        return 4
    return 2 if "64" in parts or "WIDE" in parts or name == "CS2R" or name.startswith("D") else 1


class Threads:
    """The registers of all threads of a program, as far as they are known."""

    def __init__(self, threads: int) -> None:
        self.numbers = np.arange(threads, dtype=np.float64)
        self.known: dict[str, Values] = {}

    def forget(self, names: Iterable[str]) -> None:
        """Take what these registers and predicates hold for unknown."""
        for name in names:
            self.known.pop(name, None)

    def constant(self, number: float) -> Values:
        """The same number for every thread."""
        return np.full_like(self.numbers, number)

    def value(self, operand: str) -> Values:
        """What an operand is."""
        if operand.startswith("!"):
            return 1 - self.value(operand[1:])
        if operand in ("RZ", "URZ"):
            return self.constant(0)
        if operand in ("PT", "UPT"):
            return self.constant(1)
        if operand.startswith("0x"):
            return self.constant(int(operand, 16))
        return self.known.get(operand, self.constant(np.nan))

    def holds(self, instruction: Instruction) -> Values:
        """Whether the predicate of an instruction holds, and that of a branch among its operands."""
        found = self.value(instruction.predicate.removeprefix("@")) if instruction.predicate else self.constant(1)
        if instruction.name == "BRA" and (by := BRANCHES_BY.match(instruction.operands)):
            found = both(found, self.value(by[0]))
        return found

    def run(self, instruction: Instruction) -> None:
        """Note what an instruction writes. Where its predicate is unknown, it is taken to hold."""
        result, holds = self.result(instruction), self.holds(instruction)
        before = {name: self.value(name) for name in result}
        self.forget(_operands(instruction)[:2] if instruction.name.endswith("SETP") else ())
        self.forget(() if result else _written(instruction))
        for name, value in result.items():
            self.known[name] = np.where(holds == 0, before[name], value)

    def result(self, instruction: Instruction) -> dict[str, Values]:
        """The registers and predicates that an instruction writes, if it is one of those that are computed here."""
        name, operands = instruction.name.removeprefix("U"), _operands(instruction)
        values = [self.value(each) for each in operands]
        match name:
            case "S2R" | "S2UR" if operands[1] == "SR_TID.X":
                return {operands[0]: self.numbers}
            case "MOV" | "R2UR":
                return {operands[0]: values[-1] if name == "MOV" else self.first(values[-1])}
            case "IMAD" if not any(part in instruction.opcode for part in (".WIDE", ".HI", ".X")) and len(values) == 4:
                return {operands[0]: np.mod(values[1] * values[2] + values[3], WORD + 1)}
            case "IADD3" | "VIADD" if not any(map(PREDICATE.match, operands)) and "-" not in instruction.operands:
                return {operands[0]: np.mod(sum(values[1:]), WORD + 1)}
            case "SHF" if operands[1] in ("RZ", "URZ") and ".R." in instruction.opcode:
                return {operands[0]: np.floor(values[3] / 2 ** values[2])}
            case "LOP3" if len(values) >= 6:
                *to, a, b, c, table = zip(operands[:-1], values[:-1], strict=True)
                logic = _logic(a[1], b[1], c[1], int(table[0], 16))
                return {where: (logic != 0) + 0 * logic if PREDICATE.match(where) else logic for where, _ in to}
            case "ISETP":
                return self.compared(instruction.opcode.split("."), operands, values)
            case "ELECT":
                return {operands[0]: (self.numbers % LANES == 0) * 1.0}
            case "VOTE" | "VOTEU" if instruction.opcode.endswith((".ANY", ".ALL")) and PREDICATE.match(operands[0]):
                return {operands[0]: self.voted(values[-1], is_any=instruction.opcode.endswith("ANY"))}
            case "PLOP3":
                return {operands[0]: _logic_of_three(values[2:5], int(operands[5], 16))}
        return {}

    def compared(self, opcode: list[str], operands: list[str], values: list[Values]) -> dict[str, Values]:
        """The predicate that a comparison, combined with another predicate, gives. Without `U32` it is one of signed
        numbers."""
        if opcode[1] not in COMPARED or "EX" in opcode:
            return {}
        a, b = values[2:4] if "U32" in opcode else map(signed, values[2:4])
        found = COMPARED[opcode[1]](a, b).astype(np.float64)
        found[np.isnan(values[2]) | np.isnan(values[3])] = np.nan
        if "OR" in opcode:
            return {operands[0]: 1 - both(1 - found, 1 - values[4])}
        return {operands[0]: both(found, values[4])}

    def first(self, value: Values) -> Values:
        """The value of each warp's first lane, for all of its lanes."""
        return np.repeat(value[::LANES], LANES)

    def voted(self, value: Values, *, is_any: bool) -> Values:
        """Whether a predicate holds for any or for all lanes of a warp."""
        lanes = (value if is_any else 1 - value).reshape(-1, LANES)
        unknown = np.where(np.isnan(lanes).any(1), np.nan, 0.0)
        found = np.repeat(np.where((lanes == 1).any(1), 1.0, unknown), LANES)
        return found if is_any else 1 - found


def signed(words: Values) -> Values:
    """Words of 32 bits as signed numbers."""
    return np.where(words > WORD // 2, words - (WORD + 1), words)


def both(a: Values, b: Values) -> Values:
    """Whether two predicates hold; it is known that they do not if one does not."""
    return np.where((a == 0) | (b == 0), 0.0, a * b)


def _logic(a: Values, b: Values, c: Values, table: int) -> Values:
    """The bits of a table that three words select; unknown where a word is."""
    words = [np.nan_to_num(each).astype(np.uint64) & np.uint64(WORD) for each in (a, b, c)]
    found = np.zeros(len(a), np.uint64)
    for row in range(8):
        if table >> row & 1:
            bits = [word if row >> 2 - i & 1 else ~word & np.uint64(WORD) for i, word in enumerate(words)]
            found |= bits[0] & bits[1] & bits[2]
    return np.where(np.isnan(a + b + c), np.nan, found.astype(np.float64))


def _logic_of_three(values: list[Values], table: int) -> Values:
    """The bit of a table that three predicates select, of which some may be unknown."""
    can = [np.zeros(len(values[0]), bool), np.zeros(len(values[0]), bool)]
    for row in range(8):
        fits = np.ones(len(values[0]), bool)
        for i, value in enumerate(values):
            fits &= value != 1 - (row >> 2 - i & 1)
        can[table >> row & 1] |= fits
    return np.where(can[0] & can[1], np.nan, can[1] * 1.0)
