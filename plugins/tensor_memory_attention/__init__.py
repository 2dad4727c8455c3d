"""Sparse attention in 8 bits for GPUs whose products go to tensor memory (sm_100)."""
