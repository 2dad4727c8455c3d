"""Launching kernels: what a launch is, its cubin, the driver that runs it, and the compiler that makes cubins."""
