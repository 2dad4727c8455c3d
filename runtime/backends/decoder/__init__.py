"""The VAE's decoder made of kernels and PyTorch's convolutions, with channels last."""

FIRST, NEXT = "vae_decode_first", "vae_decode_next"
"""The graphs of the decoder: of the opening chunk of one frame, and of a later chunk."""
