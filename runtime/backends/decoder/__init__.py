"""The VAE's decoder made of kernels and PyTorch's convolutions, with channels last."""
