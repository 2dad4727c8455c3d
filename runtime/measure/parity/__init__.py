"""Compares a backend with the reference at four depths: op, block, step and clip."""
