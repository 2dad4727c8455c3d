"""A linear layer with 4-bit weights and activations: blocks of 16 with a scale in fp8 each, and one scale for all."""

BLOCK = 16
"""Neighbours in a row that share a scale."""
