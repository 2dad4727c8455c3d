"""Synthetic LoRAs for tests, in every dialect."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.runtime.lora.targets import Targets, targets_of
from wanforge.runtime.reference.names import aliases

RANK = 4
ALPHA = 2.0
LAYERS = ("self_attn.q", "self_attn.o", "cross_attn.k", "ffn.0", "ffn.2")


def targets(name: str = "tiny-t2v") -> Targets:
    """What LoRAs may change in a model."""
    model = load_model(name)
    return targets_of(model, model.fitted(load_recipe("w8a8")))


def factors(found: Targets, size: float = 0.05, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors ``[R, K]`` and ``[N, R]`` for some layers of each block, by module."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in found.shapes.items():
        module, _, part = name.rpartition(".")
        if module.endswith(LAYERS) and part == "weight":
            a_RK = torch.randn(RANK, shape[1], generator=generator) / shape[1] ** 0.5
            result[module] = a_RK, size * torch.randn(shape[0], RANK, generator=generator)
    return result


def diffusers_name(module: str) -> str:
    return aliases("dit", f"{module}.weight")[1].removesuffix(".weight")


DIALECTS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "original": (lambda m: f"diffusion_model.{m}", ".lora_down.weight", ".lora_up.weight"),
    "bare": (lambda m: m, ".lora_down.weight", ".lora_up.weight"),
    "original with A and B": (lambda m: f"diffusion_model.{m}", ".lora_A.weight", ".lora_B.weight"),
    "kohya": (lambda m: f"lora_unet_{m.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
    "fun": (lambda m: f"lora_unet__{m.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": (lambda m: f"transformer.{diffusers_name(m)}", ".lora_A.weight", ".lora_B.weight"),
    "peft": (lambda m: f"base_model.model.{m}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "diffsynth": (lambda m: f"pipe.dit.{m}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "old diffusers": (lambda m: f"unet.{diffusers_name(m)}", ".lora.down.weight", ".lora.up.weight"),
    "model": (lambda m: f"model.diffusion_model.{m}", ".lora_down.weight", ".lora_up.weight"),
}
"""How each dialect spells a module, and the ends of its factors' keys."""


def spelled(dialect: str, parts: dict[str, tuple[Tensor, Tensor]], alpha: float | None = ALPHA) -> dict[str, Tensor]:
    """Factors by the keys of a dialect."""
    module, down, up = DIALECTS[dialect]
    found = {}
    for name, (a_RK, b_NR) in parts.items():
        found |= {module(name) + down: a_RK, module(name) + up: b_NR}
        if alpha is not None:
            found[module(name) + ".alpha"] = torch.tensor(alpha)
    return found


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a LoRA's file."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def lora(path: Path, model: str = "tiny-t2v", size: float = 0.05, seed: int = 0) -> Path:
    """A LoRA for a model, in the dialect of most files."""
    return write(path, spelled("original", factors(targets(model), size, seed)))


def added(parts: dict[str, tuple[Tensor, Tensor]], modules: Iterable[str], scale: float) -> dict[str, Tensor]:
    """What a LoRA adds to some modules, as whole matrices."""
    return {name: (scale * parts[name][1]) @ parts[name][0] for name in modules}
