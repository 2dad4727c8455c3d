"""Quantising a matrix to 8 bits: the definition, the kernels, and the functions that other kernels share."""

TILE = 128
"""Rows and columns of a tile that shares one scale, as in upstream."""
MOST_VALUES = 6144
"""Values of whole rows that a program keeps in registers, where a row is not wider: 48 per thread on 4 warps."""


def rows_together(columns: int) -> int:
    """How many rows of this width one program keeps in its registers: a power of two, and one at least."""
    return 1 << min(max(MOST_VALUES // columns, 1).bit_length() - 1, 4)
