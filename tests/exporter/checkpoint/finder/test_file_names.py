"""What names of files and folders say."""

from pathlib import Path

import pytest

from wanforge.exporter.checkpoint.checks import named_after
from wanforge.exporter.checkpoint.finder.file_names import (
    BY_FOLDER,
    BY_NAME,
    DENOISER,
    FOREIGN,
    NEAREST,
    PREVIEW,
    TEXT_ENCODER,
    VAE,
    kind_by_name,
    model_by_name,
    published_names,
    stem_of,
)

B480, B720 = "turbowan2.1-t2v-14b-480p", "turbowan2.1-t2v-14b-720p"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("TurboWan2.1-T2V-1.3B-480P-quant.pth", (DENOISER, BY_NAME)),
        ("x/turbowan2.2-i2v-a14b-low-720p.safetensors", (DENOISER, BY_NAME)),
        ("transformer/Wan2.1_VAE.safetensors", (VAE, BY_NAME)),
        ("models_t5_umt5-xxl-enc-bf16.pth", (TEXT_ENCODER, BY_NAME)),
        ("vae/lighttaew2_1.safetensors", (PREVIEW, BY_NAME)),
        ("taew2_1.pth", (PREVIEW, BY_NAME)),
        ("taew2_2.pth", (None, "")),
        ("transformer_2/diffusion_pytorch_model.safetensors.index.json", (DENOISER, BY_FOLDER)),
        ("vae/diffusion_pytorch_model.fp16.safetensors", (VAE, BY_FOLDER)),
        ("text_encoder/model.safetensors", (TEXT_ENCODER, BY_FOLDER)),
        ("image_encoder/model.safetensors", (FOREIGN, "")),
        ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", (FOREIGN, "")),
        ("transformer/Wan21_CausVid_14B_T2V_lora_rank32.safetensors", (FOREIGN, "")),
        ("flora-eclipse.safetensors", (None, "")),
        ("diffusion_pytorch_model.safetensors", (None, "")),
        ("transformer/x/a.pth", (None, "")),
    ],
)
def test_what_a_name_says(path: str, kind: tuple[str | None, str]) -> None:
    assert kind_by_name(Path(path), published_names(None)) == kind


@pytest.mark.parametrize(
    ("path", "expert"),
    [
        ("transformer/a.safetensors", "high"),
        ("transformer_2/a.safetensors", "low"),
        ("low_noise_model/highest.safetensors", "low"),
        ("Wan2.2-I2V-A14B-high-rCM4.0-merged.pt", "high"),
        ("wan2.2_i2v_LOW_noise.safetensors", "low"),
        ("high/a.pth", "high"),
        ("high-and-low/high/x/a.pth", "high"),
        ("high-and-low.pth", None),
        ("flow-slow.pth", None),
        ("lowvram/highres/a.pth", None),
        ("wan22_HighNoise.pth", "high"),
    ],
)
def test_which_expert_a_name_says(path: str, expert: str | None) -> None:
    assert named_after(Path("/", path), NEAREST) == expert


@pytest.mark.parametrize(
    ("path", "models"),
    [
        ("own-720p.pth", [B720]),
        ("Own_480P/a.pth", [B480]),
        ("720p/480p/a.pth", [B480]),
        ("720p/480p-and-720p.pth", [B720]),
        ("models--o--Wan-14B-720P/snapshots/0123/transformer/a.safetensors", [B720]),
        ("720p/a/b/c/d/a.pth", [B480, B720]),
        ("a.pth", [B480, B720]),
    ],
)
def test_names_tell_models_of_one_architecture_apart(path: str, models: list[str]) -> None:
    assert model_by_name(Path("/", path), [B480, B720]) == models


def test_a_single_model_needs_no_name() -> None:
    assert model_by_name(Path("/a.pth"), [B480]) == [B480]
    assert model_by_name(Path("/480p.pth"), []) == []


def test_a_stem_has_no_ending_of_a_checkpoint() -> None:
    assert stem_of("x/A.safetensors.index.json") == stem_of("a.pth") == stem_of("a.PT") == "a"
    assert stem_of("TurboWan2.1") == "turbowan2.1"
