"""Sparse-linear attention: softmax over the best key blocks, plus a linear branch over all keys."""

CHUNK_ROWS, MOST_CHUNKS = 1024, 64
"""Sums over all keys are taken in chunks of about so many rows: enough programs for any GPU, few enough to add up."""
