"""What the keys of a LoRA's file mean, in every dialect: the module that they belong to, and their part in it.

Source: ComfyUI, comfy/lora.py; musubi-tuner; diffusers, loaders/lora_conversion_utils.py; PEFT (docs/sources.md).
"""

import re
from typing import Literal, NamedTuple

Role = Literal["down", "up", "alpha", "weight", "bias", "modulation"]


class Key(NamedTuple):
    """A key of a LoRA's file.

    Attributes:
        module: The module in the file's own spelling, with underscores for dots.
        role: ``down`` or ``up``, the two factors; ``alpha``, their scale; or what the whole change is added to.
    """

    module: str
    role: Role


ROLES: tuple[tuple[str, Role], ...] = (
    (r"\.lora_down(\.[\w-]+)?\.weight", "down"),
    (r"\.lora_up(\.[\w-]+)?\.weight", "up"),
    (r"\.lora_A(\.[\w-]+)?\.weight", "down"),
    (r"\.lora_B(\.[\w-]+)?\.weight", "up"),
    (r"\.lora\.down\.weight", "down"),
    (r"\.lora\.up\.weight", "up"),
    (r"\.alpha", "alpha"),
    (r"\.diff", "weight"),
    (r"\.diff_b", "bias"),
    (r"\.diff_m", "modulation"),
)
"""Ends of keys. PEFT may put the name of an adapter, such as ``default``, before ``weight``."""

SPELLINGS = tuple((re.compile(pattern + "$"), role) for pattern, role in ROLES)

PREFIXES = re.compile(
    r"^(base_model\.model\.|diffusion_model\.|transformer\.|pipe\.dit\.|unet\.|model\.|dit\."
    r"|lora_unet__?|lora_transformer_|lycoris_)"
)
"""What trainers and programs put before a module's name."""

REFUSED = (
    (re.compile(r"\.hada_"), "LoHa, a product of two low-rank matrices element by element"),
    (re.compile(r"\.lokr_"), "LoKr, a Kronecker product"),
    (re.compile(r"\.dora_scale$|\.lora_magnitude_vector"), "DoRA, which also rescales the weight's columns"),
    (re.compile(r"\.oft_|\.boft_|\.oft\."), "OFT, which multiplies the weight by a rotation"),
    (re.compile(r"\.lora_mid\."), "a Tucker decomposition, with a third factor"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "GLoRA"),
    (re.compile(r"\.set_weight$"), "a weight that replaces the model's own"),
)
"""Kinds of adapters that are no sum of a weight and a difference of low rank, by their keys."""

IMAGE_ONLY = re.compile(r"(^|_)(k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|norm_added_k|image_embedder)(_|$)")
"""Modules that only image-to-video models of Wan 2.1 have. LoRAs of their kind are used with other models as well, and
what they change there is left out with a warning."""


def read_key(key: str) -> Key | None:
    """What a key means; None if it is in no known dialect."""
    for pattern, role in SPELLINGS:
        if found := pattern.search(key):
            return Key(spelled(key[: found.start()]), role)
    return None


def spelled(module: str) -> str:
    """A module's name without the prefixes of trainers and programs, and with underscores for dots."""
    while (shorter := PREFIXES.sub("", module)) != module:
        module = shorter
    return module.replace(".", "_")


def refusal(key: str) -> str | None:
    """Why a key belongs to a kind of adapter that cannot be merged; None if it does not."""
    return next((kind for pattern, kind in REFUSED if pattern.search(key)), None)
