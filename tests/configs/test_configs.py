"""Configurations hold the published sizes, and errors name the file and the misspelt key."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden import load_json
from wanforge.configs.causal import CachePolicy
from wanforge.configs.clip import ClipShape, adaptive_size, latent_frames, load_resolutions, size_of
from wanforge.configs.loading import CONFIGS, load, named
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import load_targets
from wanforge.configs.tiles import _Tiles
from wanforge.configs.topk import least_topk, num_selected, num_selected_of
from wanforge.errors import ConfigError

TINY = (CONFIGS / "models" / "tiny-t2v.toml").read_text()

# dim, ffn_dim, layers, heads, input channels, sigma_max, boundary, clip: TurboDiffusion, README.md,
# inference/modify_model.py and the two scripts beside it (docs/sources.md).
PUBLISHED = {
    "turbowan2.1-t2v-1.3b-480p": (1536, 8960, 30, 12, 16, 80.0, None, (832, 480)),
    "turbowan2.1-t2v-14b-480p": (5120, 13824, 40, 40, 16, 80.0, None, (832, 480)),
    "turbowan2.1-t2v-14b-720p": (5120, 13824, 40, 40, 16, 80.0, None, (1280, 720)),
    "turbowan2.2-i2v-a14b-720p": (5120, 13824, 40, 40, 36, 200.0, 0.9, (1280, 720)),
}
# The same of the families without sparse-linear attention: rCM, README.md and Wan.md; LightX2V, configs/distill.
DENSE = {
    "rcm-wan2.1-t2v-1.3b-480p": (1536, 8960, 30, 12, 16, 80.0, None, (832, 480)),
    "rcm-wan2.1-t2v-14b-480p": (5120, 13824, 40, 40, 16, 80.0, None, (832, 480)),
    "rcm-wan2.1-t2v-14b-720p": (5120, 13824, 40, 40, 16, 80.0, None, (1280, 720)),
    "rcm-wan2.2-i2v-a14b-720p": (5120, 13824, 40, 40, 36, 200.0, 0.9, (1280, 720)),
    "lightx2v-wan2.1-t2v-14b-480p": (5120, 13824, 40, 40, 16, 80.0, None, (832, 480)),
    "lightx2v-wan2.2-i2v-a14b-720p": (5120, 13824, 40, 40, 36, 80.0, None, (1280, 720)),
    "lightx2v-wan2.2-t2v-a14b-720p": (5120, 13824, 40, 40, 16, 80.0, None, (1280, 720)),
}
# The same of models that make a video chunk by chunk: rCM, Causal_rCM.md and rcm/inference/wan2pt1_t2v_causal_infer.py.
CAUSAL = {
    f"causal-rcm-wan2.1-t2v-1.3b-480p-{name}": (1536, 8960, 30, 12, 16, 80.0, None, (832, 480))
    for name in ("c1-step2", "c1-step2-noisy", "c3-step4")
}
DENSE |= CAUSAL
TINY_MODELS = {"tiny-t2v", "tiny-i2v", "tiny-rcm", "tiny-lightx2v", "tiny-causal"}
TINY_MODELS |= {"tinywan", "tinywan-i2v", "tinywan-causal"}
# linear, attention
RECIPES = {
    "bf16": ("bf16", "dense"),
    "bf16-sla": ("bf16", "sla"),
    "w8a8": ("w8a8", "sagesla"),
    "w8a8-row": ("w8a8-row", "sagesla"),
    "w8a8-64": ("w8a8", "sagesla"),
    "w8a8-256": ("w8a8", "sagesla"),
    "fp8-row": ("fp8-row", "sagesla"),
    "nvfp4": ("nvfp4", "sagesla"),
    "w8a8-vae8": ("w8a8", "sagesla"),
}
# SM, bandwidth, bf16 and int8 peaks: NVIDIA's papers.
TARGETS = {
    "rtx5090": (120, 1792.0, 209.5, 838.0),
    "rtx5080": (120, 960.0, 112.6, 450.2),
    "rtx4090": (89, 1008.0, 165.2, 660.6),
    "rtx4080": (89, 716.8, 97.5, 389.9),
    "rtx3090": (86, 936.2, 71.0, 284.0),
    "l40s": (89, 864.0, 362.05, 733.0),
    "a100": (80, 2039.0, 312.0, 624.0),
    "h100": (90, 3350.0, 989.4, 1978.9),
    "h200": (90, 4800.0, 989.4, 1978.9),
    "b200": (100, 8000.0, 2250.0, 4500.0),
}


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_shipped_files_are_the_ones_with_published_sizes() -> None:
    assert set(named("models")) == {*PUBLISHED, *DENSE, *TINY_MODELS}
    assert set(named("recipes")) == set(RECIPES)
    assert set(load_targets()) == set(TARGETS)


@pytest.mark.parametrize("name", {**PUBLISHED, **DENSE})
def test_model_has_the_published_sizes(name: str) -> None:
    model = load_model(name)
    dit, video, sampler = model.dit, model.video, model.sampler
    found = (dit.dim, dit.ffn_dim, dit.num_layers, dit.num_heads, dit.in_channels, sampler.sigma_max)
    assert (*found, sampler.boundary, (video.width_px, video.height_px)) == {**PUBLISHED, **DENSE}[name]
    assert dit.sparse == (name in PUBLISHED)
    assert (dit.out_channels, dit.text_dim, dit.text_rows, dit.frequency_dim, dit.eps) == (16, 4096, 512, 256, 1e-6)
    frames = 77 if name.startswith("rcm-wan2.1") else 81
    assert (video.frames, video.fps, sampler.steps, model.topk) == (frames, 16, 4, 0.1)


@pytest.mark.parametrize("name", [name for name in named("models") if name.startswith("lightx2v")])
def test_lightx2vs_sampler_is_upstreams(name: str) -> None:
    """Source: LightX2V, models/schedulers/wan/step_distill/scheduler.py: steps 1000 to 250, shift 5."""
    sampler = load_model(name).sampler
    assert sampler.times == tuple(5 * step / (1000 + 4 * step) for step in (1000, 750, 500, 250))
    assert (sampler.update, sampler.start, sampler.timestep) == ("euler", "one", "float32")
    assert sampler.low_from == (2 if "wan2.2" in name else None)


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_are_sampled_as_upstream_recommends(name: str) -> None:
    """Source: rCM, Causal_rCM.md: sigma_max 1600; mid points 15/16, 5/6, 5/8, and one of them for two steps."""
    model = load_model(name)
    start = 1600 / 1601
    assert model.causal
    assert model.sampler.times == (start, 15 / 16, 5 / 6, 5 / 8)
    assert (model.sampler.update, model.sampler.start, model.sampler.timestep) == ("renoise", "first time", "bfloat16")
    later = {"c1-step2": (start, 5 / 6), "c1-step2-noisy": (start, 5 / 8), "c3-step4": ()}
    kind = name.removeprefix("causal-rcm-wan2.1-t2v-1.3b-480p-")
    assert model.causal.times == later[kind]
    assert model.causal.noisy_from == (1 if kind.endswith("noisy") else None)
    frames = int(kind[1])
    assert (model.causal.first_frames, model.causal.chunk_frames) == (frames, frames)
    assert model.causal.cache == CachePolicy()
    assert model.takes_image


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("frames = 17", "frames = 13", "13 frames are 4 latent frames, which are not one chunk of 1 and others of 2"),
        ("sparse = false", "", "a causal model makes videos from text by one denoiser with full attention"),
        ("times = [0.9993753903810119, 0.9375, 0.8333333333333334, 0.625]", "", "its sampler says the times"),
        ("times = [0.9993753903810119, 0.8333333333333334]", "times = [0.5, 0.6]", "do not decrease"),
        ("chunk_frames = 2", "chunk_frames = 2\nnoisy_from = -1", "noisy_from is -1; chunks are counted from 0"),
        ("chunk_frames = 2", "chunk_frames = 2\ncache = {capacity = 3, sink = 3}", "recent must be at least 1"),
    ],
)
def test_rejects_what_a_causal_model_may_not_say(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    text = (CONFIGS / "models" / "tiny-causal.toml").read_text()
    assert old in text
    with pytest.raises(ConfigError, match=complaint):
        load_model(str(write(tmp_path, text.replace(old, new, 1))))


@pytest.mark.parametrize("name", {**PUBLISHED, **DENSE})
def test_a_recipe_is_fitted_to_the_attention_of_a_model(name: str) -> None:
    model = load_model(name)
    for recipe in map(load_recipe, RECIPES):
        fitted = model.fitted(recipe)
        assert fitted.attention == (recipe.attention if name in PUBLISHED else "dense")
        assert (fitted.name, fitted.linear, fitted.rows_per_scale) == (
            recipe.name,
            recipe.linear,
            recipe.rows_per_scale,
        )


@pytest.mark.parametrize("name", [*PUBLISHED, *DENSE, *sorted(TINY_MODELS)])
def test_model_is_consistent(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert model.task == ("i2v" if "i2v" in name else "t2v")
    has_experts = any(part in name for part in ("a14b", "i2v", "tiny-lightx2v"))
    assert model.experts == (("high", "low") if has_experts else ("",))
    assert ("{expert}" in model.checkpoint) == (len(model.experts) == 2)
    clip = model.video.clip
    assert not model.dit.sparse or num_selected_of(model.topk, -(-clip.tokens // 64)) >= 1


def test_support_networks_have_the_published_sizes() -> None:
    model = load_model("turbowan2.1-t2v-1.3b-480p")
    text = model.text_encoder
    assert (model.vae.dim, model.vae.latent_channels) == (96, 16)
    assert (text.vocab_size, text.dim, text.ffn_dim, text.num_heads, text.num_layers) == (256384, 4096, 10240, 64, 24)
    assert (text.num_buckets, text.max_distance, text.eps) == (32, 128, 1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_what_its_name_says(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.name, recipe.linear, recipe.attention) == (name, *RECIPES[name])
    assert (recipe.block_q, recipe.block_k, recipe.compat) == (128, 64, "none")
    assert recipe.vae == ("int8" if name.endswith("-vae8") else "bf16")


@pytest.mark.parametrize("name", TARGETS)
def test_target_has_the_published_peaks(name: str) -> None:
    target = load_targets()[name]
    assert (target.sm, target.bandwidth_gbs, target.bf16_tflops, target.int8_tops) == TARGETS[name]
    assert (target.fp8_tflops > 0) == (target.sm >= 89)
    assert (target.fp4_tflops > 0) == (target.sm >= 100)


def test_resolutions_are_upstreams() -> None:
    rows: list[dict[str, Any]] = load_json("resolution_table")
    assert sum(map(len, load_resolutions().values())) == len(rows)
    for row in rows:
        width, height = size_of(row["resolution"], row["aspect_ratio"])
        assert (width, height) == (row["width"], row["height"])
        clip = ClipShape(width, height, 81)
        assert [clip.latent_height, clip.latent_width] == row["latent_hw"]
        assert clip.tokens == row["tokens_81_frames"]


def test_adaptive_size_is_upstreams() -> None:
    for row in load_json("adaptive_resolution"):
        area = size_of(row["resolution"], row["aspect_ratio"])
        assert adaptive_size(tuple(row["image_wh"]), area) == tuple(row["output_wh"]), row


def test_adaptive_size_rounds_halves_to_even() -> None:
    # 16 x 2.5 and 16 x 3.5 pixels.
    assert adaptive_size((1, 1), (40, 40)) == (32, 32)
    assert adaptive_size((1, 1), (56, 56)) == (64, 64)


def test_num_selected_is_upstreams() -> None:
    for row in load_json("sla_selected_count"):
        if row["selected"]:
            assert num_selected_of(row["topk"], row["key_blocks"]) == row["selected"], row
        else:
            with pytest.raises(ConfigError, match=f"top-k {row['topk']} of {row['key_blocks']}"):
                num_selected_of(row["topk"], row["key_blocks"])


def test_a_models_own_topk_selects_at_least_one_block() -> None:
    recipe, clip = load_recipe("w8a8"), ClipShape(192, 128, 5)  # 192 tokens in 3 key blocks
    assert num_selected(recipe, clip, 0.3) == 1
    assert num_selected(recipe, clip, 0.3, asked=0.7) == 2
    with pytest.raises(ConfigError, match=r"selects no block; use at least 0\.334"):
        num_selected(recipe, clip, 0.9, asked=0.3)
    assert num_selected(load_recipe("bf16"), clip, 0.3) == 1


def test_num_selected_truncates_the_double_precision_product() -> None:
    assert num_selected_of(0.29, 100) == 28


@pytest.mark.parametrize(("topk", "key_blocks", "least"), [(0.1, 8, "0.125"), (0.1, 9, "0.112"), (0.001, 999, "0.002")])
def test_selecting_nothing_names_the_least_topk(topk: float, key_blocks: int, least: str) -> None:
    with pytest.raises(ConfigError, match=f"use at least {least}$"):
        num_selected_of(topk, key_blocks)


@pytest.mark.parametrize("key_blocks", [range(1, 2000), range(2000, 6000, 37)])
def test_least_topk_selects_and_nothing_smaller_does(key_blocks: range) -> None:
    for count in key_blocks:
        thousandths = round(least_topk(count) * 1000)
        assert least_topk(count) == thousandths / 1000, f"{least_topk(count)} has more than three decimals"
        assert num_selected_of(least_topk(count), count) == max(1, count // 1000)
        assert int((thousandths - 1) / 1000 * count) < 1


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (5, 2), (17, 5), (77, 20), (81, 21)])
def test_latent_frames(frames: int, latent: int) -> None:
    assert latent_frames(frames) == latent


@pytest.mark.parametrize(
    ("frames", "advice"),
    [(80, "77 or 81"), (82, "81 or 85"), (84, "81 or 85"), (2, "1 or 5"), (0, "1 or 5"), (-3, "1")],
)
def test_other_frame_counts_name_the_nearest(frames: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"{frames} frames cannot be encoded; use 4n\\+1, for example {advice}"):
        latent_frames(frames)


@pytest.mark.slow
@given(st.integers(-500, 500))
@settings(derandomize=True, deadline=None)
def test_latent_frames_accepts_4n_plus_1_alone(frames: int) -> None:
    if frames > 0 and frames % 4 == 1:
        assert 4 * (latent_frames(frames) - 1) + 1 == frames
    else:
        with pytest.raises(ConfigError):
            latent_frames(frames)


def test_clip_shape_counts_tokens() -> None:
    clip = ClipShape(832, 480, 81)
    assert (clip.latent_frames, clip.latent_height, clip.latent_width) == (21, 60, 104)
    assert clip.grid == (21, 30, 52)
    assert clip.tokens == 32760


@pytest.mark.parametrize("size", [(100, 160), (160, 100), (0, 16), (16, 0), (-16, 16), (8, 8)])
def test_clip_shape_refuses_what_does_not_divide_by_16(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"{size[0]}x{size[1]} .*multiples of 16"):
        ClipShape(*size, 5)


def test_clip_shape_refuses_other_frame_counts() -> None:
    with pytest.raises(ConfigError, match="6 frames"):
        ClipShape(16, 16, 6)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("dim = 256", "dimm = 256", "dit: no key is called 'dimm'; did you mean dim"),
        ("frames = 17", "framse = 17", "video: no key is called 'framse'; did you mean frames"),
        ('task = "t2v"', 'tusk = "t2v"', r"toml: no key is called 'tusk'; .*known: name, task"),
        ("frames = 17", "frames = 18", "18 frames cannot be encoded"),
        ("height_px = 128", "height_px = 100", "video.height_px: expected .* multiple of 16"),
        ("dim = 256", "dim = 200", "dit.dim: expected .* multiple of 128"),
        ("topk = 0.3", "topk = 0.0", "toml: topk: expected .* > 0.0"),
        ("topk = 0.3", "topk = 1.5", "toml: topk: expected .* <= 1.0"),
        ("dim = 256", 'dim = "256"', "dit.dim: expected `int`, got `str`"),
        ("num_layers = 2", "", "dit: the key num_layers is missing"),
        ('task = "t2v"', 'task = "v2v"', "task: 'v2v' is not allowed; use one of i2v, t2v"),
        ("dim = 256", "dim = 256\nin_channels = 20", "dit.in_channels: 20 is not allowed; use one of 16, 36"),
        ("topk = 0.3", "topk = nan", "toml: topk: expected .* > 0.0"),
        ("[vae]", "[sampler]\nsigma_max = inf\n[vae]", "sampler.sigma_max: expected `float` <= "),
        ('task = "t2v"', "task = " + "[" * 5000, "nested too deeply"),
        ('task = "t2v"', 'task = "i2v"', "task 'i2v' does not go with 16 input channels"),
        ("text_dim = 64", "text_dim = 96", "text_encoder.dim is 64 but the denoiser expects 96"),
        ("[dit]", "[dit", "mine.toml: "),
    ],
)
def test_rejects_what_a_model_file_may_not_say(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in TINY
    path = write(tmp_path, TINY.replace(old, new, 1))
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_model(str(path))
    assert str(path) in str(caught.value)


def test_rejects_unknown_key_of_a_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, 'name = "x"\nlinear = "bf16"\nattention = "dense"\nblock_h = 64')
    with pytest.raises(ConfigError, match="no key is called 'block_h'; did you mean block_q") as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("loader", "name"), [(load_model, "turbowan"), (load_recipe, "fp8"), (load_model, "../models/tiny-t2v")]
)
def test_unknown_name_lists_the_known(loader: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=r"is called .*known: .*, or give a \.toml file"):
        loader(name)


@pytest.mark.parametrize(
    ("resolution", "aspect", "known"), [("1080p", "16:9", "480p, 720p"), ("480p", "2:1", "1:1, 4:3, 3:4, 16:9, 9:16")]
)
def test_unknown_size_lists_the_known(resolution: str, aspect: str, known: str) -> None:
    with pytest.raises(ConfigError, match=known):
        size_of(resolution, aspect)


def test_a_size_can_be_given_in_pixels() -> None:
    assert size_of("1920x1088", "16:9") == (1920, 1088)
    with pytest.raises(ConfigError, match="no resolution is called '1920x'"):
        size_of("1920x", "16:9")


def test_the_place_of_a_value_inside_tables_and_lists_is_named(tmp_path: Path) -> None:
    row = 'sms = [80]\nnum_warps = 4\nnum_stages = 1\nreason = ""\n'
    for line, complaint in {
        "num_warps = 3": r"tiles\[...\]\[...\]\[0\].num_warps: 3 is not allowed; use one of 1, 2, 4, 8, 16$",
        "num_warp = 4": r"tiles\[...\]\[...\]\[0\]: no key is called 'num_warp'; did you mean num_warps\?",
    }.items():
        path = write(tmp_path, "[[tiles.op.kernel]]\n" + row.replace("num_warps = 4", line))
        with pytest.raises(ConfigError, match=complaint):
            load(path, _Tiles)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert load_model(str(write(tmp_path, "\ufeff" + TINY))) == load_model("tiny-t2v")


def test_what_is_no_ordinary_small_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match="is a pipe"):
        load_model(str(tmp_path / "pipe.toml"))
    with pytest.raises(ConfigError, match="at most 1,048,576"):
        load_model(str(write(tmp_path, "#" * (1 << 20) + "\n")))
    with pytest.raises(ConfigError, match=r"mine\.toml: .*decode"):
        load_model(str(write(tmp_path, b"name = '\xff'")))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine\.toml: no such file"):
        load_model(str(tmp_path / "mine.toml"))


def test_rejects_what_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        load_model(str(write(tmp_path, b'name = "\xff"')))


def test_rejects_a_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").mkdir()
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        load_model(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("num_layers = 2", "num_layers = 9223372036854775807"),
        ("[dit]", "[dit]\nfrequency_dim = 1"),
        ("[dit]", "[dit]\nout_channels = 3"),
        ("[dit]", "[dit]\ntext_rows = 100000000000000000000"),
    ],
)
def test_numbers_that_no_network_has_are_refused(tmp_path: Path, line: str, complaint: str) -> None:
    assert line in TINY
    with pytest.raises(ConfigError, match=r"mine\.toml: dit\."):
        load_model(str(write(tmp_path, TINY.replace(line, complaint, 1))))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("num_heads = 7", "dim is 64, which cannot be divided among 7 heads"),
        ("num_heads = 4\nnum_buckets = 1", "num_buckets"),
        ("num_heads = 4\nmax_distance = 8", "max_distance is 8, but it must be more than 8"),
    ],
)
def test_text_encoders_that_cannot_be_are_refused(tmp_path: Path, change: str, complaint: str) -> None:
    assert "num_heads = 4" in TINY
    with pytest.raises(ConfigError, match=complaint):
        load_model(str(write(tmp_path, TINY.replace("num_heads = 4", change, 1))))


def test_sums_in_fp16_hold_few_keys() -> None:
    recipe = load_recipe("w8a8")
    assert msgspec.structs.replace(recipe, pv_sum="fp16").block_k == 64
    with pytest.raises(ValueError, match="at most 64 keys in fp8, not 128"):
        msgspec.structs.replace(recipe, pv_sum="fp16", block_k=128)
