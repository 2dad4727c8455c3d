"""What the blocks of ggml's K-quants stand for, number by number, as its documentation says.

Source: ggml, src/ggml-quants.c, dequantize_row_q2_K to dequantize_row_q6_K.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Values = list[float]


def half(block: Bytes, at: int) -> float:
    return float(block[at : at + 2].view(np.float16)[0])


def scales_and_least(packed: list[int]) -> list[tuple[int, int]]:
    """The eight scales and minima of six bits in twelve bytes."""
    pairs = [(packed[j] & 63, packed[j + 4] & 63) for j in range(4)]
    for j in range(4, 8):
        scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4
        pairs.append((scale, packed[j + 4] >> 4 | (packed[j] >> 6) << 4))
    return pairs


def q2_k(block: Bytes) -> Values:
    scales, numbers, d, least = block[:16].tolist(), block[16:80].tolist(), half(block, 80), half(block, 82)
    values = [0.0] * 256
    for i in range(256):
        part, place = divmod(i, 128)
        shift, scale = 2 * (place // 32), scales[i // 16]
        number = numbers[32 * part + place % 32] >> shift & 3
        values[i] = d * (scale & 15) * number - least * (scale >> 4)
    return values


def q3_k(block: Bytes) -> Values:
    high, numbers, packed = block[:32].tolist(), block[32:96].tolist(), block[96:108].tolist()
    d, values = half(block, 108), [0.0] * 256
    for i in range(256):
        part, place = divmod(i, 128)
        group = i // 16
        low = packed[group] & 15 if group < 8 else packed[group - 8] >> 4
        scale = (low | (packed[8 + group % 4] >> 2 * (group // 4) & 3) << 4) - 32
        number = numbers[32 * part + place % 32] >> 2 * (place // 32) & 3
        is_high = high[place % 32] >> (4 * part + place // 32) & 1
        values[i] = d * scale * (number - (0 if is_high else 4))
    return values


def q4_k(block: Bytes) -> Values:
    d, least, pairs = half(block, 0), half(block, 2), scales_and_least(block[4:16].tolist())
    numbers, values = block[16:].tolist(), [0.0] * 256
    for i in range(256):
        scale, minimum = pairs[i // 32]
        byte = numbers[32 * (i // 64) + i % 32]
        values[i] = d * scale * (byte & 15 if i % 64 < 32 else byte >> 4) - least * minimum
    return values


def q5_k(block: Bytes) -> Values:
    d, least, pairs = half(block, 0), half(block, 2), scales_and_least(block[4:16].tolist())
    high, numbers, values = block[16:48].tolist(), block[48:].tolist(), [0.0] * 256
    for i in range(256):
        scale, minimum = pairs[i // 32]
        byte = numbers[32 * (i // 64) + i % 32]
        number = (byte & 15 if i % 64 < 32 else byte >> 4) + 16 * (high[i % 32] >> i // 32 & 1)
        values[i] = d * scale * number - least * minimum
    return values


def q6_k(block: Bytes) -> Values:
    low, high, scales = block[:128].tolist(), block[128:192].tolist(), block[192:208].view(np.int8).tolist()
    d, values = half(block, 208), [0.0] * 256
    for i in range(256):
        part, place = divmod(i, 128)
        quarter, column = divmod(place, 32)
        byte = low[64 * part + place % 64]
        number = (byte & 15 if quarter < 2 else byte >> 4) | (high[32 * part + column] >> 2 * quarter & 3) << 4
        values[i] = d * scales[i // 16] * (number - 32)
    return values


K_QUANTS: dict[str, tuple[Callable[[Bytes], Values], tuple[int, ...]]] = {
    "Q2_K": (q2_k, (80, 82)),
    "Q3_K": (q3_k, (108,)),
    "Q4_K": (q4_k, (0, 2)),
    "Q5_K": (q5_k, (0, 2)),
    "Q6_K": (q6_k, (208,)),
}
"""What decodes a block, and where its halves lie, by the name of the type."""
