"""Videos that are made chunk by chunk: what is asked for, and the denoiser's graphs at one chunk after the other."""
