"""The canonical layout is upstream's, tensor by tensor, and every other naming scheme maps to it."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from tests.golden import load_json
from wanforge.configs.model import load_model
from wanforge.engines.bundle.tensorfile import TensorSpec
from wanforge.exporter.checkpoint.layout import Layout, layout, published_recipe
from wanforge.runtime.reference.names import (
    aliases,
    has_sla,
    is_quantised,
    looks_like,
    match_names,
    strip_prefix,
)

TINY = load_model("tiny-t2v")
GOLDEN = {
    "turbowan2.1-t2v-1.3b-480p": "Wan2.1-1.3B",
    "turbowan2.1-t2v-14b-480p": "Wan2.1-14B",
    "turbowan2.1-t2v-14b-720p": "Wan2.1-14B",
    "turbowan2.2-i2v-a14b-720p": "Wan2.1-14B",
}
A14B_EXTRA = 5120 * (36 - 16) * 4
"""Elements that image-to-video adds to the patch embedding."""


def denoiser(model_name: str, *, quantised: bool = False, sla: bool = True) -> Layout:
    return layout("dit", load_model(model_name), published_recipe(quantised, sla))


def published_layout(model_name: str, *, quantised: bool) -> tuple[dict[str, Any], Layout]:
    """The recorded table of what upstream's conversion script writes for a model, and the layout it describes."""
    table = load_json("checkpoint_keys")[GOLDEN[model_name] + ("-quant" if quantised else "")]
    found: Layout = {}
    for pattern, (dtype, shape) in table["keys"].items():
        for i in range(table["layers"] if "{i}" in pattern else 1):
            found[pattern.replace("{i}", str(i))] = TensorSpec(dtype, tuple(shape))
    if model_name.startswith("turbowan2.2"):
        found["patch_embedding.weight"] = TensorSpec("BF16", (5120, 36 * 4))
        table = {**table, "elements": table["elements"] + A14B_EXTRA, "bytes": table["bytes"] + 2 * A14B_EXTRA}
    return table, found


def elements(specs: Layout) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("model_name", GOLDEN)
def test_denoiser_layout_is_upstreams(model_name: str, quantised: bool) -> None:
    table, expected = published_layout(model_name, quantised=quantised)
    for expert in load_model(model_name).experts:
        found = layout(f"dit.{expert}".rstrip("."), load_model(model_name), published_recipe(quantised, True))
        assert found == expected
        assert len(found) == table["tensors"]
        assert elements(found) == table["elements"]
        assert sum(spec.nbytes for spec in found.values()) == table["bytes"]


@pytest.mark.parametrize(
    ("model_name", "tensors", "count"),
    [
        ("turbowan2.1-t2v-1.3b-480p", 885, 1_419_492_160),
        ("turbowan2.1-t2v-14b-720p", 1175, 14_289_152_064),
        ("turbowan2.2-i2v-a14b-720p", 1175, 14_289_561_664),
    ],
)
def test_denoiser_has_the_published_number_of_parameters(model_name: str, tensors: int, count: int) -> None:
    found = denoiser(model_name)
    assert (len(found), elements(found)) == (tensors, count)


@pytest.mark.parametrize(
    ("component", "tensors", "count", "nbytes"),
    [("vae", 194, 126_892_531, 507_570_124), ("text_encoder", 242, 5_680_910_336, 11_361_820_672)],
)
def test_support_layouts_have_the_published_sizes(component: str, tensors: int, count: int, nbytes: int) -> None:
    found = layout(component, load_model("turbowan2.1-t2v-1.3b-480p"), published_recipe(False, True))
    assert (len(found), elements(found), sum(spec.nbytes for spec in found.values())) == (tensors, count, nbytes)


def test_without_sla_only_the_projection_is_absent() -> None:
    full, dense = denoiser("tiny-t2v"), denoiser("tiny-t2v", sla=False)
    assert dense == {name: spec for name, spec in full.items() if ".proj_l." not in name}
    assert len(full) - len(dense) == 2 * TINY.dit.num_layers


@pytest.mark.parametrize(
    ("quantised", "parts"), [(False, ["weight", "bias"]), (True, ["int8_weight", "scale", "bias"])]
)
def test_parts_of_a_linear_lie_together(quantised: bool, parts: list[str]) -> None:
    names = list(denoiser("tiny-t2v", quantised=quantised))
    first = names.index(f"blocks.0.ffn.0.{parts[0]}")
    assert names[first : first + len(parts)] == [f"blocks.0.ffn.0.{part}" for part in parts]


def diffusers_transformer(in_channels: int) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    dit = TINY.dit
    return WanTransformer3DModel(
        num_layers=dit.num_layers,
        num_attention_heads=dit.num_heads,
        attention_head_dim=128,
        in_channels=in_channels,
        ffn_dim=dit.ffn_dim,
        text_dim=dit.text_dim,
        freq_dim=dit.frequency_dim,
    )


def diffusers_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=TINY.vae.dim)


def transformers_encoder() -> torch.nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    text = TINY.text_encoder
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=text.vocab_size,
            d_model=text.dim,
            d_kv=text.dim // text.num_heads,
            d_ff=text.ffn_dim,
            num_layers=text.num_layers,
            num_heads=text.num_heads,
        )
    )


def assert_same_tensors(component: str, expected: Layout, state: dict[str, torch.Tensor]) -> None:
    matched, unexpected = match_names(component, expected, state)
    assert not unexpected
    assert set(matched) == set(expected)
    assert len(set(matched.values())) == len(matched), "two tensors have the same source"
    for name, spec in expected.items():
        shape = tuple(state[matched[name]].shape)
        flat = (shape[0], math.prod(shape[1:])) if name == "patch_embedding.weight" else shape
        assert flat == spec.shape, name


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["tiny-t2v", "tiny-i2v"])
def test_finds_every_tensor_of_diffusers_transformer(model_name: str) -> None:
    state = diffusers_transformer(load_model(model_name).dit.in_channels).state_dict()
    expected = denoiser(model_name, sla=False)
    assert_same_tensors("dit", expected, state)
    matched, _ = match_names("dit", denoiser(model_name), state)
    assert set(denoiser(model_name)) - set(matched) == {name for name in denoiser(model_name) if ".proj_l." in name}


@pytest.mark.slow
def test_finds_every_tensor_of_diffusers_vae() -> None:
    assert_same_tensors("vae", layout("vae", TINY, published_recipe(False, False)), diffusers_vae().state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("dropped", ["shared.weight", "encoder.embed_tokens.weight", ""])
def test_finds_every_tensor_of_transformers_encoder(dropped: str) -> None:
    state = dict(transformers_encoder().state_dict())
    state.pop(dropped, None)
    assert_same_tensors("text_encoder", layout("text_encoder", TINY, published_recipe(False, False)), state)


# These are from scripts/convert_wan_to_diffusers.py of diffusers (docs/sources.md), which numbers norms in the order of
# execution: its norm2 is norm3 here.
SPELLINGS = [
    ("dit", "patch_embedding.weight", "patch_embedding.weight"),
    ("dit", "text_embedding.0.bias", "condition_embedder.text_embedder.linear_1.bias"),
    ("dit", "text_embedding.2.weight", "condition_embedder.text_embedder.linear_2.weight"),
    ("dit", "time_embedding.0.weight", "condition_embedder.time_embedder.linear_1.weight"),
    ("dit", "time_embedding.2.bias", "condition_embedder.time_embedder.linear_2.bias"),
    ("dit", "time_projection.1.weight", "condition_embedder.time_proj.weight"),
    ("dit", "head.head.weight", "proj_out.weight"),
    ("dit", "head.modulation", "scale_shift_table"),
    ("dit", "blocks.7.modulation", "blocks.7.scale_shift_table"),
    ("dit", "blocks.7.self_attn.q.weight", "blocks.7.attn1.to_q.weight"),
    ("dit", "blocks.7.self_attn.k.bias", "blocks.7.attn1.to_k.bias"),
    ("dit", "blocks.7.cross_attn.v.weight", "blocks.7.attn2.to_v.weight"),
    ("dit", "blocks.7.self_attn.o.weight", "blocks.7.attn1.to_out.0.weight"),
    ("dit", "blocks.7.cross_attn.o.bias", "blocks.7.attn2.to_out.0.bias"),
    ("dit", "blocks.7.self_attn.norm_q.weight", "blocks.7.attn1.norm_q.weight"),
    ("dit", "blocks.7.cross_attn.norm_k.weight", "blocks.7.attn2.norm_k.weight"),
    ("dit", "blocks.7.norm3.weight", "blocks.7.norm2.weight"),
    ("dit", "blocks.7.norm3.bias", "blocks.7.norm2.bias"),
    ("dit", "blocks.7.ffn.0.weight", "blocks.7.ffn.net.0.proj.weight"),
    ("dit", "blocks.7.ffn.2.bias", "blocks.7.ffn.net.2.bias"),
    ("dit", "blocks.7.ffn.2.int8_weight", "blocks.7.ffn.net.2.weight"),
    ("dit", "blocks.7.self_attn.o.scale", "blocks.7.attn1.to_out.0.weight_scale_inv"),
    ("dit", "blocks.7.self_attn.attn_op.local_attn.proj_l.bias", "blocks.7.attn1.attn_op.local_attn.proj_l.bias"),
    ("dit", "blocks.7.self_attn.attn_op.local_attn.proj_l.bias", "blocks.7.attn1.attn_impl.proj_l.bias"),
    ("dit", "blocks.7.self_attn.attn_op.local_attn.proj_l.weight", "blocks.7.attn1.local_attn.proj_l.weight"),
    ("vae", "conv1.weight", "quant_conv.weight"),
    ("vae", "conv2.bias", "post_quant_conv.bias"),
    ("vae", "encoder.conv1.weight", "encoder.conv_in.weight"),
    ("vae", "decoder.conv1.bias", "decoder.conv_in.bias"),
    ("vae", "encoder.downsamples.3.shortcut.weight", "encoder.down_blocks.3.conv_shortcut.weight"),
    ("vae", "encoder.downsamples.5.time_conv.weight", "encoder.down_blocks.5.time_conv.weight"),
    ("vae", "encoder.downsamples.8.resample.1.bias", "encoder.down_blocks.8.resample.1.bias"),
    ("vae", "encoder.middle.0.residual.0.gamma", "encoder.mid_block.resnets.0.norm1.gamma"),
    ("vae", "decoder.middle.1.to_qkv.weight", "decoder.mid_block.attentions.0.to_qkv.weight"),
    ("vae", "decoder.middle.2.residual.6.bias", "decoder.mid_block.resnets.1.conv2.bias"),
    ("vae", "decoder.upsamples.0.residual.2.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
    ("vae", "decoder.upsamples.3.resample.1.weight", "decoder.up_blocks.0.upsamplers.0.resample.1.weight"),
    ("vae", "decoder.upsamples.4.shortcut.weight", "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"),
    ("vae", "decoder.upsamples.7.time_conv.bias", "decoder.up_blocks.1.upsamplers.0.time_conv.bias"),
    ("vae", "decoder.upsamples.10.residual.3.gamma", "decoder.up_blocks.2.resnets.2.norm2.gamma"),
    ("vae", "decoder.upsamples.14.residual.6.weight", "decoder.up_blocks.3.resnets.2.conv2.weight"),
    ("vae", "decoder.head.0.gamma", "decoder.norm_out.gamma"),
    ("vae", "encoder.head.2.weight", "encoder.conv_out.weight"),
    ("text_encoder", "token_embedding.weight", "shared.weight"),
    ("text_encoder", "token_embedding.weight", "encoder.embed_tokens.weight"),
    ("text_encoder", "norm.weight", "encoder.final_layer_norm.weight"),
    ("text_encoder", "blocks.7.norm1.weight", "encoder.block.7.layer.0.layer_norm.weight"),
    ("text_encoder", "blocks.7.norm2.weight", "encoder.block.7.layer.1.layer_norm.weight"),
    ("text_encoder", "blocks.7.attn.o.weight", "encoder.block.7.layer.0.SelfAttention.o.weight"),
    (
        "text_encoder",
        "blocks.7.pos_embedding.embedding.weight",
        "encoder.block.7.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    ("text_encoder", "blocks.7.ffn.gate.0.weight", "encoder.block.7.layer.1.DenseReluDense.wi_0.weight"),
    ("text_encoder", "blocks.7.ffn.fc1.weight", "encoder.block.7.layer.1.DenseReluDense.wi_1.weight"),
    ("text_encoder", "blocks.7.ffn.fc2.weight", "encoder.block.7.layer.1.DenseReluDense.wo.weight"),
]


@pytest.mark.parametrize(("component", "canonical", "other"), SPELLINGS)
def test_spelling(component: str, canonical: str, other: str) -> None:
    assert match_names(component, [canonical], [other]) == ({canonical: other}, [])


@pytest.mark.parametrize("component", ["dit", "vae", "text_encoder"])
@pytest.mark.parametrize("quantised", [False, True])
def test_no_two_tensors_share_a_spelling(component: str, quantised: bool) -> None:
    names = layout(component, TINY, published_recipe(quantised, True))
    spellings = [spelling for name in names for spelling in set(aliases(component, name))]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize("prefix", ["net.", "module.", "model.diffusion_model."])
def test_prefix_that_all_names_have_is_ignored(prefix: str) -> None:
    names = list(denoiser("tiny-t2v"))
    matched, unexpected = match_names("dit", names, [prefix + name for name in names])
    assert matched == {name: prefix + name for name in names}
    assert not unexpected


def test_prefix_that_some_names_lack_is_kept() -> None:
    assert strip_prefix(["net.a", "b"]) == {"net.a": "net.a", "b": "b"}
    matched, unexpected = match_names("dit", ["head.modulation"], ["net.head.modulation", "epoch"])
    assert (matched, unexpected) == ({}, ["net.head.modulation", "epoch"])


def test_missing_and_unexpected_are_told_apart() -> None:
    names = list(denoiser("tiny-t2v"))
    matched, unexpected = match_names("dit", names, [*names[1:], "img_emb.proj.0.weight"])
    assert set(names) - set(matched) == {names[0]}
    assert unexpected == ["img_emb.proj.0.weight"]


def test_canonical_spelling_comes_first() -> None:
    matched, unexpected = match_names(
        "text_encoder", ["norm.weight"], ["encoder.final_layer_norm.weight", "norm.weight"]
    )
    assert (matched, unexpected) == ({"norm.weight": "norm.weight"}, [])


def test_tells_files_apart_by_their_names() -> None:
    plain, quantised = denoiser("tiny-t2v"), denoiser("tiny-t2v", quantised=True)
    assert [is_quantised(plain), is_quantised(quantised)] == [False, True]
    assert is_quantised([aliases("dit", name)[1] for name in quantised])
    assert [has_sla(plain), has_sla(denoiser("tiny-t2v", sla=False))] == [True, False]
    assert all(has_sla([spelling]) for spelling in aliases("dit", next(n for n in plain if ".proj_l." in n)))


def spelt(component: str, names: Iterable[str], spelling: int) -> list[str]:
    return [aliases(component, name)[spelling] for name in names]


@pytest.mark.parametrize("in_order", [list, sorted], ids=["in-order", "alphabetical"])
@pytest.mark.parametrize("spelling", [0, 1], ids=["canonical", "diffusers"])
@pytest.mark.parametrize(
    ("component", "kind"), [("dit", "a denoiser"), ("vae", "a VAE"), ("text_encoder", "a text encoder")]
)
@pytest.mark.parametrize("model_name", ["tiny-t2v", "turbowan2.1-t2v-14b-480p"])
def test_recognises_a_kind_of_file(model_name: str, component: str, kind: str, spelling: int, in_order: Any) -> None:
    names = layout(component, load_model(model_name), published_recipe(False, True))
    assert looks_like(dict.fromkeys(in_order(spelt(component, names, spelling)))) == kind


def test_recognises_nothing_in_other_names() -> None:
    assert looks_like({"model.layers.0.mlp.weight": 0}) is None
