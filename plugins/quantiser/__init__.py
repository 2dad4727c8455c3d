"""Quantising a matrix to 8 bits: the definition, the kernels, and the functions that other kernels share."""

TILE = 128
"""Rows and columns of a tile that shares one scale, as in upstream."""
