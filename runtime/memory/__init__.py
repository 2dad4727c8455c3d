"""The memory of a request: buffers, weights that stay or take turns, and what the machine has of it."""
