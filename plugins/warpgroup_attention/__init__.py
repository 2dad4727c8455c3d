"""Sparse-linear attention for GPUs whose warpgroups multiply asynchronously (sm_90), and what decides where
kernels in Gluon run."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from wanforge.configs.tiles import load_tiles
from wanforge.plugins.launching.launch import architecture_of

FIRST_TRITON = 3, 9
"""The first version of Triton whose Gluon compiles such kernels."""


def serves(device: torch.device, kernel: str) -> bool:
    """Whether a kernel in Gluon runs on a device: the tile table has tiles for its architecture, and the installed
    Triton, if there is any, compiles it."""
    return architecture_of(device) in _architectures(kernel)


@cache
def _architectures(kernel: str) -> frozenset[int]:
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        major, minor = map(str, FIRST_TRITON)
    rows = load_tiles().get(kernel, []) if (int(major), int(minor)) >= FIRST_TRITON else []
    return frozenset(sm for row in rows for sm in row.sms)
