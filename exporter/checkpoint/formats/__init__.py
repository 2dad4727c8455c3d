"""Weights that other projects have quantised: how each of their layouts is told, and what its numbers stand for."""
