"""Sparse-linear attention: softmax over the best key blocks, plus a linear branch over all keys."""
