"""Low-rank changes of a denoiser's linears: trained, written as a LoRA, and merged into weights.

Letters: N K rows and columns of a weight, R rank.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wanforge.runtime.reference.dit import DiT, Linear
from wanforge.whole_file import temporary_file

PREFIX = "diffusion_model."
"""What names begin with in the files that ComfyUI and the original trainers write."""
RANK, ALPHA = 8, 16.0
TARGETS = (".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")
"""Ends of the names of the linears that are changed."""


class LowRank(nn.Module):
    """A change of a weight, zero at first: ``W + alpha / R * up down``."""

    def __init__(self, weight_NK: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight_NK.shape
        self.down = nn.Parameter(torch.randn(RANK, columns, generator=generator) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight_NK: Tensor) -> Tensor:
        return weight_NK + ALPHA / RANK * (self.up @ self.down)


def adapt(dit: DiT, seed: int = 0) -> nn.ModuleDict:
    """Give a denoiser's linears low-rank changes, and return these by name, with ``/`` in the place of dots."""
    generator, changes = torch.Generator().manual_seed(seed), nn.ModuleDict()
    for name, module in dit.blocks.named_modules():
        if isinstance(module, Linear) and name.endswith(TARGETS):
            change = LowRank(module.weight.detach(), generator)
            parametrize.register_parametrization(module, "weight", change)
            changes[f"blocks.{name}".replace(".", "/")] = change
    return changes


def write_lora(changes: nn.ModuleDict, path: Path) -> None:
    """Write the changes as a LoRA, in bfloat16."""
    tensors = {}
    for name, change in changes.items():
        assert isinstance(change, LowRank)
        layer = PREFIX + name.replace("/", ".")
        tensors[f"{layer}.lora_down.weight"] = change.down.detach().bfloat16()
        tensors[f"{layer}.lora_up.weight"] = change.up.detach().bfloat16()
        tensors[f"{layer}.alpha"] = torch.tensor(ALPHA)
    with temporary_file(path) as temporary:
        save_file(tensors, temporary)
        temporary.replace(path)


def merged(weights: Mapping[str, Tensor], lora: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """A denoiser's weights with a LoRA added, in float32."""
    found = {name: weight.float() for name, weight in weights.items()}
    for name, down_RK in lora.items():
        layer, end, _ = name.partition(".lora_down.weight")
        if end:
            up_NR, alpha = lora[f"{layer}.lora_up.weight"].float(), float(lora[f"{layer}.alpha"])
            change_NK = strength * alpha / len(down_RK) * (up_NR @ down_RK.float())
            found[f"{layer.removeprefix(PREFIX)}.weight"] += change_NK
    return found
