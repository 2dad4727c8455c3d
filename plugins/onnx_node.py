"""How an op enters an ONNX graph: one node that a function body, or a TensorRT plugin of the same name, stands for."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DOMAIN = "wanforge"
VERSION = 1

Attribute = int | float | str


def is_exporting() -> bool:
    """Whether a graph is being traced for ONNX."""
    return torch.onnx.is_in_onnx_export()


def emit(
    name: str, inputs: Sequence[Tensor], attributes: Mapping[str, Attribute], *, like: Tensor, shape: Sequence[int]
) -> Tensor:
    """One node ``wanforge::name``, its output of the type of `like`.

    TensorRT takes the plugin over the function body only where the node names the plugin's namespace and version.
    """
    plugin = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
    output: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}",
        inputs,
        attrs={**attributes, **plugin},
        dtype=like.dtype,
        shape=shape,
        version=VERSION,
    )
    return output
