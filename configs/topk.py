"""Top-k: from the share that a user asks for to the number of key blocks that attention selects.

Everywhere, `topk` is the share and `num_selected` the number; only this module converts one into the other.
"""

from wanforge.configs.clip import ClipShape
from wanforge.configs.recipe import Recipe
from wanforge.errors import ConfigError, RequestError


def num_key_blocks(recipe: Recipe, clip: ClipShape) -> int:
    """Number of key blocks of a clip; 1 if attention is dense and nothing is selected."""
    return -(-clip.tokens // recipe.block_k) if recipe.is_sparse else 1


def num_selected(recipe: Recipe, clip: ClipShape, default: float, asked: float | None = None) -> int:
    """Number of key blocks that each query block attends to; 1 if attention is dense.

    Args:
        default: The model's own top-k. Where a clip is so small that this selects no block, one block is selected, so
            that every model can make every clip.
        asked: The top-k that a user asks for, which takes the place of the model's own.

    Raises:
        RequestError: `asked` is not a share.
        ConfigError: `asked` selects no block of this clip.
    """
    if not recipe.is_sparse:
        return 1
    key_blocks = num_key_blocks(recipe, clip)
    if asked is None:
        return max(1, truncated_share(default, key_blocks))
    if not 0 < asked <= 1:
        raise RequestError(f"top-k {asked} is not a share of the key blocks; use more than 0 and at most 1")
    return num_selected_of(asked, key_blocks)


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
