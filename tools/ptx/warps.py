"""The registers of whole warps."""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tools.ptx.faults import UnsupportedError
from tools.ptx.machine import WARP, State
from tools.ptx.syntax import Operand, Register, Vector

Array = NDArray[Any]


def parts_of(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def registers_of(operand: Operand) -> tuple[Register, ...]:
    """The registers of an operand in braces.

    Raises:
        UnsupportedError: It has other parts.
    """
    parts = parts_of(operand)
    if any(not isinstance(part, Register) for part in parts):
        raise UnsupportedError(f"the machine does not know {operand}")
    return cast(tuple[Register, ...], parts)


def words_of(state: State, registers: tuple[Register, ...], lanes: Array) -> Array:
    """Registers of 32 bits of some threads, [threads, registers]."""
    return np.stack([state.registers[register.index][lanes] for register in registers], 1)


def put_words(state: State, registers: tuple[Register, ...], lanes: Array, words: Array) -> None:
    """Write such registers."""
    for index, register in enumerate(registers):
        value = state.registers[register.index].copy()
        value[lanes] = words[:, index]
        state.registers[register.index] = value


def of_warps(warps: Array) -> Array:
    """The threads of warps, [warps, 32]."""
    return warps[:, None] * WARP + np.arange(WARP)
