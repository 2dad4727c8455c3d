"""Holds a backend against the reference at four depths: op, block, step, clip."""
