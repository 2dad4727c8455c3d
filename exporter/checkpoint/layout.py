"""The tensors that each published file holds: names, shapes and types, derived from the reference networks.

Source: TurboDiffusion, inference/modify_model.py and ops/core.py; Wan2.1, wan/modules/vae.py and t5.py
(docs/sources.md).
"""

import re

import torch
from torch import Tensor, nn

from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.tensorfile import TensorSpec
from wanforge.plugins.launching.launch import ALIGNMENT
from wanforge.runtime.dtypes import STORED_NAMES
from wanforge.runtime.reference.networks import network
from wanforge.runtime.reference.quantised_weights import WEIGHTS

Layout = dict[str, TensorSpec]

FLOAT32 = re.compile(r"\.(norm_q|norm_k|norm3)\.(weight|bias)$|\.(global_)?scale$")
"""Tensors of a denoiser that are float32 in the published files; the others are bfloat16, or `QUANTISED`."""

QUANTISED = (torch.int8, torch.uint8, torch.float8_e4m3fn)
"""Types that only quantised weights and their scales have."""


def layout(component: str, model: ModelConfig, recipe: Recipe) -> Layout:
    """The tensors of one component in canonical naming, in the order in which a bundle stores them.

    Tensors whose sizes are no multiples of `ALIGNMENT` come last, so that all others lie at multiples of it.
    """
    module = network(component, model, recipe)
    specs = {n: TensorSpec(_dtype(component, n, tensor), tuple(tensor.shape)) for n, tensor in _ordered(module)}
    return dict(sorted(specs.items(), key=lambda item: item[1].nbytes % ALIGNMENT != 0))


def published_recipe(quantised: bool, has_sla: bool) -> Recipe:
    """A stand-in recipe with the tensors of a published file of this kind."""
    return Recipe(name="published", linear="w8a8" if quantised else "bf16", attention="sla" if has_sla else "dense")


def _ordered(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The module's state with the parts of each linear together; a module lists its buffers after its parameters."""
    part = {**dict.fromkeys(("weight", *WEIGHTS), 0), "scale": 1, "global_scale": 2, "bias": 3}
    state = module.state_dict()
    owners = {name.rpartition(".")[0]: index for index, name in reversed(list(enumerate(state)))}

    def position(name: str) -> tuple[int, int]:
        owner, _, leaf = name.rpartition(".")
        return owners[owner], part.get(leaf, 4)

    return [(name, state[name]) for name in sorted(state, key=position)]


def _dtype(component: str, name: str, tensor: Tensor) -> str:
    if tensor.dtype in QUANTISED:
        return STORED_NAMES[tensor.dtype]
    if component in ("vae", "preview") or (component.startswith("dit") and FLOAT32.search(name)):
        return "F32"
    return "BF16"
