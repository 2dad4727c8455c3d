"""How far a backend may be from the reference: the table in ``parity.toml``, which gives a reason for each row."""

import msgspec

from wanforge.configs.loading import CONFIGS, Fraction, Positive, Record, load
from wanforge.configs.recipe import Recipe, load_recipe


class Limits(Record, frozen=True):
    """How far a backend may be from the reference at one depth. A limit of None is not checked; values that are not
    finite never pass."""

    reason: str
    rms: Positive | None = None
    """Largest RMS of the difference, relative to the RMS of the reference."""
    max: Positive | None = None
    """Largest single difference, relative to the RMS of the reference."""
    cosine: Fraction | None = None
    """Smallest cosine similarity."""
    psnr_db: Positive | None = None
    """Smallest peak signal-to-noise ratio."""
    ssim: Fraction | None = None
    """Smallest structural similarity."""


class DepthLimits(Record, frozen=True):
    """The limits of a recipe in one compute type, depth by depth; see `runtime.measure.parity`."""

    op: Limits
    """Every op on the reference's inputs, and every graph that is little more than one op."""
    rounded: Limits
    """Ops that round or select internally: sparse attention, and ops that a backend quantises in the same kernel."""
    block: Limits
    """A layer of the denoiser on the reference's inputs."""
    step: Limits
    """A step on the reference's latents."""
    clip: Limits
    """The frames of a whole request."""
    decoder: Limits | None = None
    """A chunk of the VAE's decoder on the reference's inputs; None where the limits of an op hold."""


class _Parity(Record, frozen=True):
    parity: dict[str, dict[str, DepthLimits]]
    decoder: dict[str, dict[str, Limits]]
    """By the format of the decoder, where it is not the compute type."""


def load_limits(recipe: Recipe, compute: str) -> DepthLimits | None:
    """The limits of a backend that computes in this type (``float32``); None if no limits are known.

    A recipe of another name has the limits of the known recipe with the same number formats. Where quantised linears
    have full attention, which rounds and selects nothing, the limits are those of the recipe with the same linears.
    """
    found = load(CONFIGS / "parity.toml", _Parity)
    table, decoder = found.parity, found.decoder.get(recipe.vae, {}).get(compute)
    known = [load_recipe(name) for name in table]
    same = [each for each in known if each.linear == recipe.linear]
    for each in (*(each for each in same if each.attention == recipe.attention), *([] if recipe.is_sparse else same)):
        limits = table[each.name].get(compute)
        return limits and msgspec.structs.replace(limits, decoder=decoder)
    return None
