"""A rough estimate of how much memory a request takes besides its weights, made before it starts."""

from wanforge.configs.causal import CausalConfig
from wanforge.configs.clip import ClipShape, frames_of
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.errors import ResourceError
from wanforge.host.capacity import available_bytes
from wanforge.runtime.causal.kept import KeptApart

OVERHEAD = 600_000_000
"""Bytes of the libraries and of everything that is not counted below."""
VAE_LIVE = 6
"""The number of full-resolution activations alive at once in the VAE's last level."""


def needed_bytes(
    model: ModelConfig, recipe: Recipe, shape: ClipShape, itemsize: int, kept: KeptApart | None = None
) -> int:
    """The bytes that denoising or decoding takes on a CPU, whichever is more.

    Weights are not counted: they are mapped from files, and the system may drop them.

    Args:
        shape: Of a clip; for a causal model, of a video whose last chunk sees as much as any.
        itemsize: Bytes of one element of the compute type.
        kept: For a causal model, how it keeps keys and values apart from where attention reads them, if it does.
    """
    if model.causal:
        chunk, logits = of_chunk(model.causal, shape), seen_tokens(model.causal, shape)
        found = denoise_bytes(model, chunk, logits, itemsize) + one_layer_bytes(model, shape, itemsize)
        return (
            OVERHEAD + remembered_bytes(model, shape, itemsize, kept) + max(found, decode_bytes(model, shape, itemsize))
        )
    logits = recipe.block_k if recipe.is_sparse else shape.tokens
    return OVERHEAD + max(denoise_bytes(model, shape, logits, itemsize), decode_bytes(model, shape, itemsize))


def check_memory(
    model: ModelConfig, recipe: Recipe, shape: ClipShape, itemsize: int, kept: KeptApart | None = None
) -> None:
    """Refuse a clip for which this machine's memory is too small on a CPU; see `needed_bytes`.

    Raises:
        ResourceError: It is too small.
    """
    needed, available = needed_bytes(model, recipe, shape, itemsize, kept), available_bytes()
    if needed > available:
        raise ResourceError(
            f"{shape.width_px}x{shape.height_px} with {shape.frames} frames needs about {needed / 1e9:.1f} GB of "
            f"memory on this backend, but only {available / 1e9:.1f} GB are free; make the clip smaller or shorter"
        )


def needed_device_bytes(model: ModelConfig, recipe: Recipe, shape: ClipShape, itemsize: int) -> int:
    """The bytes that denoising or decoding takes on a GPU besides weights, whichever is more. There, dense attention
    keeps no more logits at a time than sparse attention. What a causal model remembers is not counted, because it lies
    in the arena or is counted by whoever keeps it.

    Args:
        shape: As in `needed_bytes`.
        itemsize: Bytes of one element of the compute type.
    """
    if model.causal:
        found = denoise_bytes(model, of_chunk(model.causal, shape), recipe.block_k, itemsize)
        return max(found + one_layer_bytes(model, shape, itemsize), decode_bytes(model, shape, itemsize))
    return max(denoise_bytes(model, shape, recipe.block_k, itemsize), decode_bytes(model, shape, itemsize))


def denoise_bytes(model: ModelConfig, shape: ClipShape, logits: int, itemsize: int) -> int:
    """The bytes of the residual stream, queries, keys, values, the widest hidden layer with its float32 copy, the
    attention logits, and the text's keys and values.

    What is small beside these is left out: patches, rotations, modulations, and the moments of the residual stream,
    which take less than a two-hundredth of the first of these.

    Args:
        logits: Number of logits per query that exist at the same time.
    """
    dit, tokens = model.dit, shape.tokens
    widest = tokens * (8 * dit.dim + 2 * dit.ffn_dim) * max(4, itemsize)
    context = dit.num_layers * len(model.experts) * 2 * dit.text_rows * dit.dim * itemsize
    return widest + dit.num_heads * tokens * logits * 4 + context


def of_chunk(causal: CausalConfig, shape: ClipShape) -> ClipShape:
    """The shape of a longest chunk of a video."""
    return ClipShape(shape.width_px, shape.height_px, frames_of(causal.longest))


def seen_tokens(causal: CausalConfig, shape: ClipShape) -> int:
    """The most tokens that attention reads at a time: what the last chunk of a video sees, and a longest chunk."""
    return (causal.past_frames(shape.latent_frames) + causal.longest) * shape.tokens // shape.latent_frames


def remembered_bytes(model: ModelConfig, shape: ClipShape, itemsize: int, kept: KeptApart | None) -> int:
    """The bytes of every layer's keys and values that a causal model's network reads; those of the longest chunk are
    counted as well, which the network writes. What is kept elsewhere is read for one layer at a time."""
    one = one_layer_bytes(model, shape, itemsize)
    if kept is None:
        return model.dit.num_layers * one
    assert model.causal
    tokens = of_chunk(model.causal, shape).tokens
    own = 2 * tokens * model.dit.dim * itemsize
    return kept.nbytes(model.dit, tokens, itemsize) + model.dit.num_layers * own + one - own


def one_layer_bytes(model: ModelConfig, shape: ClipShape, itemsize: int) -> int:
    """The bytes of one layer's keys and values, which attention may bring together."""
    assert model.causal
    return 2 * seen_tokens(model.causal, shape) * model.dit.dim * itemsize


def decode_bytes(model: ModelConfig, shape: ClipShape, itemsize: int) -> int:
    """The bytes of both sets of caches and of the activations of one chunk of four frames at full resolution."""
    pixels = shape.width_px * shape.height_px
    latent_pixels = shape.latent_height * shape.latent_width
    caches = 2 * 151_328 * latent_pixels * model.vae.dim // 96
    return (caches + VAE_LIVE * 2 * 4 * model.vae.dim * pixels) * itemsize
