"""Quantising a matrix to NVFP4: the kernel, and the functions with which other kernels quantise what they compute. Its
definition is `plugins.nvfp4_linear.reference.quantise_blocks`."""
