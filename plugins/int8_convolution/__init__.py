"""A convolution of the VAE's decoder in int8: causal, 3x3x3, behind a norm over channels whose gain sets its scales."""

REACH = 4.0
"""The largest step stands for a value of this many times the norm's gain, and what is larger is clipped. Behind the
norm, the mean square over channels of a value divided by its gain is one (docs/decisions/0051-int8-decoding.md)."""
FULL_SCALE = 127.0
LEAST_REACH = 1e-6
"""The reach of a channel whose gain is smaller."""
WIDTH = 3
"""Taps along time, rows and columns."""
TAPS = WIDTH**3
