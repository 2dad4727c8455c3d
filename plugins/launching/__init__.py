"""Kernel launches, the cubins they need, the driver that runs them, and the compiler that makes cubins."""

Constant = int | float | bool | str | None
"""A compile-time constant of a kernel, or a run-time argument that is not a tensor."""

SCRATCH = 2
"""The number of null pointers that follow the parameters of every kernel."""
