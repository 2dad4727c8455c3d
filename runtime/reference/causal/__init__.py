"""The denoiser of causal models, which make a video chunk by chunk and remember the chunks before."""
