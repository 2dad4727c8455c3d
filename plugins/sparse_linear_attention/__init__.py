"""Sparse-linear attention: softmax over the best key blocks, plus a linear branch over all keys."""

CHUNK_ROWS, MOST_CHUNKS = 1024, 64
"""The approximate rows per chunk, and the most chunks, of sums over all keys: enough programs for any GPU, few enough
to add up."""
