"""Matrix products of tensor cores, with the layouts in which warps and warpgroups hold their operands (PTX ISA,
warp-level and warpgroup-level matrix instructions).

Products and their sum are computed exactly enough that one rounding to float32 is left. Hardware keeps fewer bits of
the partial sums, which no document of NVIDIA's defines; `FEW_BITS` stands for what was measured of fp8 on sm_89 and
sm_90, and of 4-bit floats on sm_120.
"""

from enum import Enum
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.numbers import cut_off, from_bf16, from_e2m1, from_e4m3

Array = NDArray[Any]
WARP = 32
WARPGROUP = 128
SCALED_TOGETHER = 16
"""Neighbours along K that have a scale in common (``scale_vec::4X`` of a product with K = 64)."""


class Sums(Enum):
    """How sums of products of fp8 or 4-bit floats are kept: as float32, or with as few bits as were measured.

    Of fp8 on Hopper these are 13 bits after the point of the largest addend (DeepSeek-V3 technical report, section
    3.3.2, which speaks of 14 bits with the leading one). Of 4-bit floats on RTX Blackwell they are 35 bits, where an
    addend is the exact sum of a block times its scales; what float32 does not hold of the total is cut off (MMA-Sim,
    arXiv:2511.10909).
    """

    FULL = 0
    FEW_BITS = 1


def elements(words: Array, kind: str) -> Array:
    """The numbers in 32-bit words [..., n] as [..., n * k], the lowest bits first."""
    flat = np.ascontiguousarray(words)
    match kind:
        case "s8":
            return flat.view(np.int8).astype(np.float32)
        case "e4m3":
            return from_e4m3(flat.view(np.uint8))
        case "e2m1":
            return from_e2m1(flat.view(np.uint8))
        case "bf16":
            return from_bf16(flat.view(np.uint16))
        case "f16":
            return flat.view(np.float16).astype(np.float32)
    raise KeyError(kind)


def product(a_RK: Array, b_CK: Array, c_RC: Array, kind: str, sums: Sums, *, saturates: bool = False) -> Array:
    """a b^T + c for stacks of matrices. Integers wrap or saturate, and floating-point sums are rounded once."""
    if kind == "s8":
        whole = np.matmul(a_RK, b_CK.swapaxes(-1, -2)).astype(np.int64) + c_RC.astype(np.int64)
        if saturates:
            return np.clip(whole, -(2**31), 2**31 - 1).astype(np.int32)
        return whole.astype(np.uint64).astype(np.uint32).view(np.int32)
    if kind == "e4m3" and sums is Sums.FEW_BITS:
        return _few_bits(a_RK, b_CK, c_RC, 1, 13).astype(np.float32)
    if kind == "e2m1" and sums is Sums.FEW_BITS:
        return cut_off(_few_bits(a_RK, b_CK, c_RC, SCALED_TOGETHER, 35))
    exact = np.matmul(a_RK.astype(np.float64), b_CK.astype(np.float64).swapaxes(-1, -2))
    return (exact + c_RC).astype(np.float32)


def _few_bits(a_RK: Array, b_CK: Array, c_RC: Array, together: int, bits: int) -> Array:
    """The sum as float64, of addends with so many bits after the point of the largest. An addend is the exact sum of
    so many products, or an element of c."""
    products = a_RK[..., :, None, :].astype(np.float64) * b_CK[..., None, :, :]
    partial = products.reshape(*products.shape[:-1], -1, together).sum(-1)
    addends = np.concatenate([partial, c_RC[..., None].astype(np.float64)], -1)
    largest = np.abs(addends).max(-1, keepdims=True)
    unit = np.exp2(np.floor(np.log2(np.maximum(largest, 2.0**-60))) - bits)
    return (np.trunc(addends / unit) * unit).sum(-1)


# A warp's lane is 4 * group + member.
GROUP, MEMBER = np.divmod(np.arange(WARP), 4)


def a_fragment(registers: Array, kind: str) -> Array:
    """The 16 rows of A that a warp holds in four registers: [warps, 32, 4] words to [warps, 16, K]."""
    values = elements(registers, kind)  # [warps, 32, 4 * per]
    warps, _, count = values.shape
    per = count // 4
    result = np.empty((warps, 16, 8 * per), np.float32)
    for register in range(4):
        rows = GROUP + 8 * (register % 2)
        columns = (register // 2) * 4 * per + MEMBER[:, None] * per + np.arange(per)
        result[:, rows[:, None], columns] = values[:, :, register * per : (register + 1) * per]
    return result


def b_fragment(registers: Array, kind: str) -> Array:
    """The 8 columns of B that a warp holds in two registers: [warps, 32, 2] words to [warps, 8, K]."""
    values = elements(registers, kind)
    warps, _, count = values.shape
    per = count // 2
    result = np.empty((warps, 8, 8 * per), np.float32)
    for register in range(2):
        columns = register * 4 * per + MEMBER[:, None] * per + np.arange(per)
        result[:, GROUP[:, None], columns] = values[:, :, register * per : (register + 1) * per]
    return result


def c_matrix(registers: Array) -> Array:
    """The 16x8 accumulators of a warp: [warps, 32, 4] to [warps, 16, 8]."""
    result = np.empty((registers.shape[0], 16, 8), registers.dtype)
    for register in range(4):
        result[:, GROUP + 8 * (register // 2), 2 * MEMBER + register % 2] = registers[:, :, register]
    return result


def c_registers(matrix: Array) -> Array:
    """The inverse of `c_matrix`."""
    rows = np.stack([GROUP + 8 * (register // 2) for register in range(4)], 1)
    columns = np.stack([2 * MEMBER + register % 2 for register in range(4)], 1)
    return matrix[:, rows, columns]


def group_c_matrix(registers: Array) -> Array:
    """The 64xN accumulators of a warpgroup: [groups, 128, N / 2] to [groups, 64, N]."""
    groups, _, count = registers.shape
    tiles = registers.reshape(groups * 4, WARP, count // 4, 4).transpose(0, 2, 1, 3).reshape(-1, WARP, 4)
    matrix = c_matrix(tiles).reshape(groups, 4, count // 4, 16, 8)
    return matrix.transpose(0, 1, 3, 2, 4).reshape(groups, 64, count * 2)


def group_c_registers(matrix: Array) -> Array:
    """The inverse of `group_c_matrix`."""
    groups, _, columns = matrix.shape
    tiles = matrix.reshape(groups, 4, 16, columns // 8, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 8)
    registers = c_registers(tiles).reshape(groups, 4, columns // 8, WARP, 4)
    return registers.transpose(0, 1, 3, 2, 4).reshape(groups, WARPGROUP, columns // 2)


def scale_holders(rows: int, thread: int) -> Array:
    """The lanes whose registers hold the four scales of each of 16 rows of A or 8 columns of B.

    Args:
        thread: The selector of an instruction: which pair of each four lanes holds scales of A (0 or 1), or which of
            them holds those of B (0 to 3).
    """
    row, apart = np.arange(rows), rows // 8
    return 4 * (row % 8) + apart * thread + row // 8


def in_blocks(values_RK: Array, scales_RB: Array) -> Array:
    """Numbers times the scales of their blocks, which is exact in float32."""
    return values_RK * np.repeat(scales_RB, SCALED_TOGETHER, axis=-1)


SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}
"""How many address bits, from bit 7, are mixed into those from bit 4, by the swizzle mode of a descriptor."""


@cache
def operand_places(descriptor: int, rows: int, bytes_of_k: int, element: int, *, transposed: bool) -> Array:
    """The addresses in shared memory of an operand's elements, [rows, K]. They must not be written to.

    Args:
        descriptor: The matrix descriptor: addresses and strides in units of 16 bytes.
        element: Bytes of an element.
        transposed: Whether rows, not K, are contiguous.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    bits = SWIZZLES[descriptor >> 62]
    width = 16 << bits  # the bytes of a row that are swizzled together
    row, k = np.arange(rows)[:, None], np.arange(bytes_of_k // element)[None, :]
    if transposed:
        per = width // element
        linear = start + row // per * leading + row % per * element + k // 8 * stride + k % 8 * width
    else:
        linear = start + row // 8 * stride + row % 8 * width + k * element
    return linear ^ ((linear >> 7 & ((1 << bits) - 1)) << 4)
