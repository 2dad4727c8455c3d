"""How much memory a request takes on a CPU, roughly and before it starts."""

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe

OVERHEAD = 600_000_000
"""Bytes of the libraries and of what is not counted below."""
VAE_LIVE = 6
"""Full-resolution activations alive at once in the VAE's last level."""


def needed_bytes(model: ModelConfig, recipe: Recipe, shape: ClipShape, itemsize: int) -> int:
    """The larger of denoising and decoding, weights apart: those are mapped, and the system may drop them.

    Args:
        itemsize: bytes of one element of the compute type.
    """
    return OVERHEAD + max(denoise_bytes(model, recipe, shape, itemsize), decode_bytes(model, shape, itemsize))


def denoise_bytes(model: ModelConfig, recipe: Recipe, shape: ClipShape, itemsize: int) -> int:
    """Residual stream, queries, keys, values and the widest hidden layer with its float32 copy; logits of whole rows
    where attention is dense."""
    dit, tokens = model.dit, shape.tokens
    widest = tokens * (8 * dit.dim + 2 * dit.ffn_dim) * max(4, itemsize)
    rows = tokens if recipe.attention == "dense" else recipe.block_k
    context = dit.num_layers * len(model.experts) * 2 * dit.text_rows * dit.dim * itemsize
    return widest + dit.num_heads * tokens * rows * 4 + context


def decode_bytes(model: ModelConfig, shape: ClipShape, itemsize: int) -> int:
    """Both sets of caches and the activations of one chunk of four frames at full resolution."""
    pixels = shape.width_px * shape.height_px
    latent_pixels = shape.latent_height * shape.latent_width
    caches = 2 * 151_328 * latent_pixels * model.vae.dim // 96
    return (caches + VAE_LIVE * 2 * 4 * model.vae.dim * pixels) * itemsize
