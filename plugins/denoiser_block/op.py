"""A whole block as one op of a graph: when there is one, and what its node tells a plugin."""

from collections.abc import Sequence

import msgspec

from wanforge.configs.model import DiTConfig
from wanforge.configs.recipe import Recipe
from wanforge.plugins.quantiser import TILE

NAME = "Block"
GRAPH = "block_whole"
"""The graph that has this op for its only node, and computes the same as ``block``."""

PORTS = ("hidden", "modulation", "keys", "values", "key_bias", "cos", "sin", "selection")
"""The inputs that are no weights, in the order of the graph ``block``."""


def has_plugin(recipe: Recipe) -> bool:
    """Whether a block is nothing but kernels: its linears are in int8, and its attention is sparse."""
    return recipe.linear in ("w8a8", "w8a8-row") and recipe.tile == TILE and recipe.is_sparse


def attributes(config: DiTConfig, recipe: Recipe, weights: Sequence[str]) -> dict[str, str]:
    """The node's attributes: what a plugin must know besides shapes.

    Args:
        weights: The names of the node's inputs after those of `PORTS`.
    """
    network, formats = (msgspec.json.encode(each).decode() for each in (config, recipe))
    return {"network": network, "recipe": formats, "weights": " ".join(weights)}
