"""Quantising a matrix to 8 bits: the definition, the kernels, and what other kernels share of them."""

TILE = 128
"""Rows and columns of a tile that shares one scale, as upstream has it."""
