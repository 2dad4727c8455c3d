"""What lies between two convolutions of the VAE: a norm over channels, SiLU, sums, past frames and doubled pixels."""

PAST = 2
"""Number of earlier frames that a causal convolution reads."""
