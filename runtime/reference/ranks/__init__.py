"""One request on several GPUs: what each of them computes of the denoiser, in plain PyTorch."""
