"""PyTorch's element types by the names of `engines.bundle.dtypes`, and the types of a graph's ports."""

from typing import Literal

import torch

from wanforge.engines.bundle.dtypes import COMPUTE_TYPES, DTYPES

STORED = {dtype.stored: getattr(torch, dtype.name) for dtype in DTYPES}
"""PyTorch's type by its name in safetensors files."""

STORED_NAMES = {torch_type: stored for stored, torch_type in STORED.items()}

ONNX_NUMBERS = {getattr(torch, dtype.name): dtype.onnx for dtype in DTYPES}
"""The number that ONNX gives each PyTorch type."""

COMPUTE = {dtype.short: getattr(torch, dtype.name) for dtype in COMPUTE_TYPES}
"""PyTorch's type by the short name of a compute type: ``bf16``."""

PortType = Literal["compute", "float32", "int32", "int64", "int8", "float8_e4m3fn"]
"""Element type of a port or a buffer; ``compute`` is the compute type of the run."""


def element_type(port_type: PortType, compute: torch.dtype) -> torch.dtype:
    """The PyTorch type of a port or a buffer in a run with this compute type."""
    if port_type == "compute":
        return compute
    dtype: torch.dtype = getattr(torch, port_type)
    return dtype
