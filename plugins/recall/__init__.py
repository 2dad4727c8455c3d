"""Reading remembered keys and values: from where each is kept once to where attention reads them, keys rotated."""

GROUP = 64
"""Numbers in 8 bits that share a scale: tokens of keys, channels of values."""
