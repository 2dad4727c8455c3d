"""The reference network of each component, without weights."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor, nn

from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.runtime.reference.dit import DiT, add_side_paths
from wanforge.runtime.reference.preview import PreviewDecoder
from wanforge.runtime.reference.text_encoder import TextEncoder
from wanforge.runtime.reference.vae import VAE


def network(component: str, model: ModelConfig, recipe: Recipe, side_rank: int = 0) -> nn.Module:
    """The reference network of a component, on the meta device, where it takes no memory.

    Args:
        side_rank: The rank of the products beside the quantised linears of a denoiser; 0 for none.
    """
    with torch.device("meta"):
        match component:
            case "vae":
                return VAE(model.vae, recipe.vae)
            case "text_encoder":
                return TextEncoder(model.text_encoder)
            case "preview" if model.preview:
                return PreviewDecoder(model.preview)
        dit = DiT(model.dit, recipe)
        if side_rank:
            add_side_paths(dit, side_rank)
        return dit


@cache
def tensors(component: str, model: ModelConfig, recipe: Recipe, side_rank: int = 0) -> Mapping[str, Tensor]:
    """The tensors of a component's network on the meta device, by canonical name; see `network`. The result is cached:
    callers must not change it."""
    return MappingProxyType(network(component, model, recipe, side_rank).state_dict())
