"""Sparse-linear attention for GPUs whose warpgroups multiply asynchronously (sm_90)."""
