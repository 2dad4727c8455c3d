"""The networks in plain PyTorch, exact by specification: what every other path is held against."""
