"""What is checked of the numbers in registers: that addresses do not wrap, and that results are finite."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.syntax import Address, Instruction, Kernel, Register, registers_in

if TYPE_CHECKING:
    from tools.ptx.machine import State

Array = NDArray[Any]

EXACT: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "shl": lambda a, b: a << b,
}
"""What instructions on 32-bit integers would compute if these had no end."""
MOVES_ADDRESSES = {*EXACT, "mov", "cvt", "or", "selp", "min", "max"}
"""Instructions through which an address is followed back to what it is made of."""


def addressing(kernel: Kernel) -> set[int]:
    """The places of the instructions on 32-bit integers whose results become addresses, directly or by way of
    others."""
    wanted = {
        operand.base.index
        for each in kernel.instructions
        for operand in each.operands
        if isinstance(operand, Address) and isinstance(operand.base, Register)
    }
    moving = [
        (each.operands[0].index, each)
        for each in kernel.instructions
        if each.words[0] in MOVES_ADDRESSES and isinstance(each.operands[0], Register)
    ]
    before = -1
    while before != len(wanted):
        before = len(wanted)
        for result, each in moving:
            if result in wanted:
                wanted |= {register.index for register in registers_in(each.operands[1:])}
    return {each.place for result, each in moving if result in wanted and has_range(each)}


def has_range(instruction: Instruction) -> bool:
    """Whether the result of an instruction is a 32-bit integer that may be too small for it."""
    words = instruction.words
    return words[0] in EXACT and words[-1] in ("s32", "u32", "b32") and not {"wide", "hi"} & {*words}


def check_range(state: "State", instruction: Instruction, exact: Array, mask: Array | None) -> None:
    """Report address arithmetic that wraps."""
    lanes = state.chosen(mask)
    wrong = (exact[lanes] < -(2**31)) | (exact[lanes] >= 2**31)
    if wrong.any():
        state.report(instruction, lanes)("lets a 32-bit number wrap that becomes an address", wrong, None)


def check_finite(
    state: "State", instruction: Instruction, given: Sequence[Array], value: Array, mask: Array | None
) -> None:
    """Report infinity, or what is no number, that comes from finite numbers."""
    wrong = ~np.isfinite(value)
    for each in given:
        if each.dtype == np.float32:
            wrong &= np.isfinite(each)
    lanes = state.chosen(mask)
    some = np.asarray(wrong.reshape(len(state.lanes), -1).any(1))[lanes]
    if some.any():
        state.report(instruction, lanes)("makes infinity or no number out of finite numbers", some, None)
