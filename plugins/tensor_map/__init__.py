"""Tensor maps: what bulk copies of sm_90 and later bring from memory to shared memory, as parameters of kernels."""
