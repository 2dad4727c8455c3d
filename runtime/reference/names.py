"""Names of the tensors in files from other sources: diffusers, transformers, and wrappers that add a prefix.

The canonical names are those in the files of TurboDiffusion and Wan.
Source: diffusers, scripts/convert_wan_to_diffusers.py; Wan2.1, wan/modules (docs/sources.md).
"""

import re
from collections.abc import Iterable, Mapping

PREFIXES = ("net.", "module.", "model.diffusion_model.", "model.", "_fsdp_wrapped_module.")

COUNTERS = "accum_"
"""How the names of training counters begin, which rCM's files hold beside the weights."""

IMAGE_BRANCH = ("img_emb.", ".k_img.", ".v_img.", "image_embedder.", ".add_k_proj.", ".add_v_proj.")
"""Parts of the names of that branch in the files of Wan and of diffusers."""

Rules = tuple[tuple[str, str], ...]

DENOISER: Rules = (
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.(self|cross)_attn\.([qkv])\.", r".\1_attn.to_\2."),
    (r"\.(self|cross)_attn\.o\.", r".\1_attn.to_out.0."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"\.(int8|fp8|fp4)_weight$", ".weight"),
    (r"\.scale$", ".weight_scale_inv"),
)
"""Rules from canonical names to those of diffusers, applied in order. The last two are for quantised re-uploads."""

PROJECTIONS = ("attn1.attn_impl.proj_l", "attn1.local_attn.proj_l")
"""The names of `attn1.attn_op.local_attn.proj_l` in FastVideo and SGLang."""

VAE: Rules = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)

TEXT_ENCODER: Rules = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


def aliases(component: str, name: str) -> list[str]:
    """Every known spelling of a canonical name, the canonical one first."""
    match component:
        case "vae":
            return [name, _upsampler(_apply(VAE, name))]
        case "text_encoder":
            other = _apply(TEXT_ENCODER, name)
            return [name, other, *(["encoder.embed_tokens.weight"] if other == "shared.weight" else [])]
        case "preview":
            return [name]
    other = _apply(DENOISER, name)
    return [name, other, *(other.replace("attn1.attn_op.local_attn.proj_l", short) for short in PROJECTIONS)]


def _apply(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _upsampler(name: str) -> str:
    """Group the decoder's flat list by level, as diffusers does: three residual blocks each and, except in the last
    level, an upsampler."""

    def grouped(match: re.Match[str]) -> str:
        level, place = divmod(int(match[1]), 4)
        return f".up_blocks.{level}." + ("upsamplers.0." if place == 3 else f"resnets.{place}.")

    return re.sub(r"\.upsamples\.(\d+)\.", grouped, name)


def strip_prefix(names: Iterable[str]) -> dict[str, str]:
    """The names in a file by their names without the prefixes of wrappers, each of which is removed only if all names
    have it."""
    found = list(names)
    shorter = found
    while prefix := next((each for each in PREFIXES if found and all(name.startswith(each) for name in shorter)), ""):
        shorter = [name.removeprefix(prefix) for name in shorter]
    return dict(zip(shorter, found, strict=True))


def match_names(component: str, canonical: Iterable[str], found: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Find each canonical tensor in a file.

    Returns:
        The names in the file by canonical name, for the tensors that it has, and the names in the file that match none
        and are no `counters`.
    """
    in_file = strip_prefix(found)
    matched: dict[str, str] = {}
    used: set[str] = set()
    for name in canonical:
        spellings = [alias for alias in aliases(component, name) if alias in in_file]
        used.update(spellings)
        if spellings:
            matched[name] = in_file[spellings[0]]
    used.update(counters(in_file))
    return matched, [in_file[name] for name in in_file if name not in used]


def counters(found: Iterable[str]) -> list[str]:
    """Those names, without a wrapper's prefix, that are counters of training, on which nothing depends."""
    return [name for name in strip_prefix(found) if name.startswith(COUNTERS)]


def is_quantised(names: Iterable[str]) -> bool:
    """Whether a denoiser's file holds 8-bit linears."""
    return any(name.endswith((".int8_weight", ".weight_scale_inv")) for name in names)


def has_sla(names: Iterable[str]) -> bool:
    """Whether a denoiser's file holds the linear branch of sparse-linear attention."""
    return any(".proj_l." in name for name in names)


def has_image_branch(names: Iterable[str]) -> bool:
    """Whether a denoiser's file holds the branch through which Wan2.1's image-to-video models see CLIP's features."""
    return any(part in name for name in names for part in IMAGE_BRANCH)


def looks_like(names: Mapping[str, object]) -> str | None:
    """What kind of file this is, judged by its names, for the error message when files have been mixed up."""
    joined = " ".join(strip_prefix(names))
    if "patch_embedding" in joined:
        return "a denoiser"
    if "decoder." in joined and ("time_conv" in joined or "conv_in" in joined):
        return "a VAE"
    if "decoder." in joined and ".conv.4." in joined:
        return "a preview decoder"
    if "token_embedding" in joined or "shared.weight" in joined or "SelfAttention" in joined:
        return "a text encoder"
    return None
