"""What each stage of a request costs relative to the others, roughly and at once, for telling how long the rest takes.

The matrix products of the transformers are counted by formula. Those of the VAE are what `stages.operations` counts at
its published width. How fast a machine gets through either is not known beforehand and shows while it works.
"""

from wanforge.configs.causal import CausalConfig
from wanforge.configs.model import DiTConfig, ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.runtime.reference.causal.chunks import chunks_of, trajectories
from wanforge.runtime.request import CheckedRequest

PUBLISHED_DIM = 96
DECODE_FIRST, DECODE_NEXT = 6.97e8, 2.17e9
ENCODE_FIRST, ENCODE_NEXT = 4.36e8, 1.29e9
"""Operations of the VAE per latent pixel for the first and for every following latent frame."""


def stage_shares(model: ModelConfig, recipe: Recipe, checked: CheckedRequest) -> dict[str, float]:
    """The operations of each stage of a request that reports progress, in the order in which they run."""
    if model.causal:
        return {
            "text": text_operations(model, checked),
            "chunk": chunk_operations(model, model.causal, checked),
            "decode": vae_operations(model, checked, DECODE_FIRST, DECODE_NEXT),
        }
    steps = {f"step {step.index + 1}": step_operations(model, recipe, checked) for step in checked.steps}
    condition = {"condition": vae_operations(model, checked, ENCODE_FIRST, ENCODE_NEXT)} if model.task == "i2v" else {}
    return {
        "text": text_operations(model, checked),
        **condition,
        "prepare": context_operations(model, checked),
        **steps,
        "decode": vae_operations(model, checked, DECODE_FIRST, DECODE_NEXT),
    }


def text_operations(model: ModelConfig, checked: CheckedRequest) -> float:
    """The operations of the text encoder's layers."""
    text = model.text_encoder
    return 2.0 * len(checked.ids) * text.num_layers * (4 * text.dim**2 + 3 * text.dim * text.ffn_dim)


def context_operations(model: ModelConfig, checked: CheckedRequest) -> float:
    """The operations that turn the text into keys and values for every layer of each expert."""
    dit, experts = model.dit, len({step.expert for step in checked.steps})
    return 2.0 * experts * dit.text_rows * (dit.text_dim * dit.dim + (1 + 2 * dit.num_layers) * dit.dim**2)


def step_operations(model: ModelConfig, recipe: Recipe, checked: CheckedRequest) -> float:
    """The operations of one step of the denoiser: its linears, and attention to the selected keys."""
    tokens = checked.request.shape.tokens
    keys = checked.num_selected * recipe.block_k if recipe.is_sparse else tokens
    return pass_operations(model.dit, tokens, keys)


def chunk_operations(model: ModelConfig, causal: CausalConfig, checked: CheckedRequest) -> float:
    """The operations of all chunks of a causal model: the steps of each and the pass that remembers it, as if each saw
    everything before it."""
    shape, found = checked.request.shape, 0.0
    of_frame = shape.tokens // shape.latent_frames
    causal = causal.beginning(with_image=checked.request.image is not None)
    for chunk, way in zip(chunks_of(causal, shape.latent_frames), trajectories(causal, model.sampler), strict=False):
        found += (len(way.steps) + 1) * pass_operations(model.dit, of_frame * len(chunk), of_frame * chunk.stop)
    return found


def pass_operations(dit: DiTConfig, tokens: int, keys: int) -> float:
    """The operations of one pass through the denoiser, each of whose tokens sees some keys."""
    linears = 6 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim
    return dit.num_layers * tokens * (2.0 * linears + 4.0 * keys * dit.dim)


def vae_operations(model: ModelConfig, checked: CheckedRequest, first: float, following: float) -> float:
    """The operations of one half of the VAE."""
    shape = checked.request.shape
    frames = first + following * (shape.latent_frames - 1)
    return frames * shape.latent_height * shape.latent_width * (model.vae.dim / PUBLISHED_DIM) ** 2
