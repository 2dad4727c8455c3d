"""Launching kernels: what a launch is, its cubin, the driver that runs it, and the compiler that makes cubins."""

Constant = int | float | bool | str | None
"""A compile-time constant of a kernel, or a run-time argument that is no tensor."""
