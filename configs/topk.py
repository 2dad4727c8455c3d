"""Top-k: from the share that a user asks for to the number of key blocks that attention selects.

Everywhere, `topk` is the share and `num_selected` the number; only this module converts one into the other.
"""

from wanforge.configs.clip import ClipShape
from wanforge.configs.recipe import Recipe
from wanforge.errors import ConfigError, RequestError


def num_key_blocks(recipe: Recipe, clip: ClipShape) -> int:
    """Number of key blocks of a clip; 1 if attention is dense and nothing is selected."""
    return -(-clip.tokens // recipe.block_k) if recipe.is_sparse else 1


def num_selected(recipe: Recipe, clip: ClipShape, topk: float) -> int:
    """Number of key blocks that each query block attends to; 1 if attention is dense.

    Raises:
        RequestError: `topk` is not a share.
        ConfigError: It selects no block of this clip.
    """
    if not recipe.is_sparse:
        return 1
    if not 0 < topk <= 1:
        raise RequestError(f"top-k {topk} is not a share of the key blocks; use more than 0 and at most 1")
    return num_selected_of(topk, num_key_blocks(recipe, clip))


def num_selected_of(topk: float, key_blocks: int) -> int:
    """Number of key blocks that a share of them amounts to.

    Source: TurboDiffusion, SLA/utils.py (docs/sources.md), which divides zero by zero if the product is below one.

    Raises:
        ConfigError: `topk` selects no block at all.
    """
    count = truncated_share(topk, key_blocks)
    if count < 1:
        raise ConfigError(
            f"top-k {topk} of {key_blocks} key blocks selects no block; use at least {least_topk(key_blocks)}"
        )
    return count


def truncated_share(topk: float, key_blocks: int) -> int:
    """The product in double precision, truncated as in upstream's code; it may be zero."""
    return min(key_blocks, int(topk * key_blocks))


def least_topk(key_blocks: int) -> float:
    """The smallest top-k, to three decimals, that selects one of `key_blocks`."""
    return -(-1000 // key_blocks) / 1000
