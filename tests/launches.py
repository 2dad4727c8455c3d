"""Launches of two real kernels, recorded on the meta device."""

import torch

from wanforge.plugins.launching.launch import Launch, recording
from wanforge.plugins.layer_norm import fused as layer_norm
from wanforge.plugins.quantiser.fused import empty_quantised
from wanforge.plugins.w8a8_linear import fused as w8a8_linear


def norm_launch(sm: int, width: int = 256) -> Launch:
    """A modulated layer norm in bfloat16."""
    with torch.device("meta"), recording(sm) as launches:
        x, gain = torch.empty(300, width, dtype=torch.bfloat16), torch.empty(width, dtype=torch.bfloat16)
        layer_norm.norm(x, gain, gain, 1e-6, modulated=True)
    return launches[0]


def gemm_launch(sm: int, outputs: int = 256) -> Launch:
    """A W8A8 linear with one weight and bfloat16 output."""
    with torch.device("meta"), recording(sm) as launches:
        x = empty_quantised(300, 512, torch.device("meta"))
        weight = w8a8_linear.Weight(*_weight(outputs, 512))
        w8a8_linear.linears(x, [weight])
    return launches[0]


def _weight(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = torch.empty(-(-outputs // 128), inputs // 128)
    return torch.empty(outputs, inputs, dtype=torch.int8), scale, torch.empty(outputs, dtype=torch.bfloat16)
