"""A whole block of the denoiser: its launches, and one plugin for TensorRT that makes them."""
