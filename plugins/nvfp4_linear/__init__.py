"""A linear layer with 4-bit weights and activations: blocks of 16 with a scale in fp8 each, and one scale for all."""

ARCHITECTURES = (120,)
"""Those with kernels. Their tensor cores take operands and scales from registers; those of sm_100 take them from other
memory, which needs other kernels."""
BLOCK = 16
"""Neighbours in a row that share a scale."""
LARGEST = 6.0
"""The largest 4-bit float."""
LARGEST_SCALE = 448.0
"""The largest 8-bit float."""
INPUT_SCALE = 0.25
"""The global scale of activations. It is a constant, because a scale that follows the values would need another pass
over them, and TensorRT's products take no other. Scales have their full precision in blocks whose largest magnitude is
from 0.023 to 672; those of TinyWan lie between 0.034 and 11.3 (docs/log.md)."""
