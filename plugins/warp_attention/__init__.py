"""Sparse-linear attention for GPUs whose warps multiply on their own (`mma.sync`)."""
