"""The pipeline that is called as diffusers' is: what it makes, and what it refuses."""

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import wanforge
from tests.runtime.lora.lora_files import lora
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import BundleError, CheckpointError, ConfigError, RequestError
from wanforge.library.wan_pipeline import FOREIGN

BundleOf = Callable[[str, str], Bundle]
PROMPT = "A red kite over a windy beach."
SMALL: dict[str, Any] = {"width": 96, "height": 64, "num_frames": 5, "num_inference_steps": 1}


@pytest.fixture
def bundle(bundle_of: BundleOf) -> Path:
    return bundle_of("tiny-t2v", "bf16").root


@pytest.fixture
def pipe(bundle: Path) -> wanforge.WanforgePipeline:
    return wanforge.WanforgePipeline.from_pretrained(bundle, backend="ort")


@pytest.mark.slow
def test_a_clip_is_the_one_that_generate_makes(pipe: wanforge.WanforgePipeline) -> None:
    same = pipe.pipeline.generate(PROMPT, size=(96, 64), frames=5, steps=1, seed=7).frames
    by_seed = pipe(PROMPT, seed=7, output_type="np", **SMALL)
    assert (by_seed.frames.shape, by_seed.frames.dtype) == ((1, 5, 64, 96, 3), np.float32)
    assert np.array_equal(np.round(by_seed.frames[0] * 255).astype(np.uint8), same)
    assert np.array_equal(by_seed.clips[0].frames, same)
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        assert np.array_equal(pipe(PROMPT, generator=generator, **SMALL).frames, by_seed.frames)


@pytest.mark.slow
def test_frames_have_the_forms_that_diffusers_gives_them(pipe: wanforge.WanforgePipeline) -> None:
    as_np = pipe(PROMPT, guidance_scale=1.0, **SMALL).frames
    as_pt = pipe(PROMPT, output_type="pt", **SMALL).frames
    assert (as_pt.shape, as_pt.dtype) == ((1, 5, 3, 64, 96), torch.float32)
    assert np.array_equal(as_pt.permute(0, 1, 3, 4, 2).numpy(), as_np)
    (pictures,) = pipe(PROMPT, output_type="pil", **SMALL).frames
    assert [type(each) for each in pictures] == [Image.Image] * 5
    assert np.array_equal(np.stack([np.asarray(each) for each in pictures]), np.round(as_np[0] * 255).astype(np.uint8))
    (frames,) = pipe(PROMPT, return_dict=False, **SMALL)
    assert np.array_equal(frames, as_np)
    assert np.array_equal(pipe(PROMPT, **SMALL)[0], as_np)


@pytest.mark.slow
def test_several_clips_have_seeds_of_their_own(pipe: wanforge.WanforgePipeline) -> None:
    found = pipe([PROMPT, "A blue boat."], num_videos_per_prompt=2, seed=3, **SMALL)
    assert found.frames.shape == (4, 5, 64, 96, 3)
    assert [(clip.request.prompt, clip.request.seed) for clip in found.clips] == [
        (PROMPT, 3),
        (PROMPT, 4),
        ("A blue boat.", 5),
        ("A blue boat.", 6),
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in (9, 2)]
    assert [clip.request.seed for clip in pipe([PROMPT] * 2, generator=generators, **SMALL).clips] == [9, 2]


def test_a_callback_sees_each_step_and_can_end_the_request(pipe: wanforge.WanforgePipeline) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def note(pipeline: wanforge.WanforgePipeline, step: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        assert pipeline is pipe
        seen.append((step, timestep, tuple(tensors["predicted_latents"].shape)))

    pipe(PROMPT, callback_on_step_end=note, **{**SMALL, "num_inference_steps": 3})
    assert [(step, shape) for step, _, shape in seen] == [(step, (1, 16, 2, 8, 12)) for step in range(3)]
    assert seen[0][1] > seen[1][1] > seen[2][1]

    def stop(*told: object) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        pipe(PROMPT, callback_on_step_end=stop, **SMALL)
    assert pipe.pipeline.watch is None
    assert pipe(PROMPT, **SMALL).frames.shape == (1, 5, 64, 96, 3)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"guidance_scale": 5.0}, "guidance_scale is 5, but these models are distilled to do without"),
        ({"negative_prompt": "blurry"}, "negative_prompt has no meaning here: it works through guidance"),
        ({"latents": torch.zeros(1)}, "latents has no meaning here: the noise of every step is drawn from seed"),
        ({"seed": 1, "generator": torch.Generator()}, "give generator or seed, not both"),
        ({"generator": [torch.Generator()] * 2}, "there are 2 generators for 1 clips"),
        ({"num_videos_per_prompt": 0}, "there are 1 prompts, and num_videos_per_prompt is 0; give at least 1 of both"),
    ],
)
def test_what_means_nothing_here_is_refused_with_the_reason(
    pipe: wanforge.WanforgePipeline, wrong: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint):
        pipe(PROMPT, **wrong, **SMALL)


def test_no_prompt_at_all_is_refused(pipe: wanforge.WanforgePipeline) -> None:
    with pytest.raises(RequestError, match="there are 0 prompts, and num_videos_per_prompt is 1"):
        pipe([], **SMALL)


def test_what_is_left_out_by_none_is_left_out(pipe: wanforge.WanforgePipeline) -> None:
    none = {"negative_prompt": None, "guidance_scale": None, "latents": None, "generator": None}
    assert np.array_equal(pipe(PROMPT, **none, **SMALL).frames, pipe(PROMPT, **SMALL).frames)


@pytest.mark.slow
def test_keywords_are_those_of_diffusers() -> None:
    from diffusers import WanImageToVideoPipeline, WanPipeline

    ours = set(inspect.signature(wanforge.WanforgePipeline.__call__).parameters) - {"seed", "topk"}
    theirs = [set(inspect.signature(each.__call__).parameters) for each in (WanPipeline, WanImageToVideoPipeline)]
    assert theirs[0] | theirs[1] == ours | FOREIGN.keys()
    assert not ours & FOREIGN.keys()


def test_misspelt_keywords_are_named(pipe: wanforge.WanforgePipeline) -> None:
    with pytest.raises(TypeError, match="no parameter is called 'num_frame'; did you mean num_frames"):
        pipe(PROMPT, num_frame=5)
    with pytest.raises(TypeError, match="Invalid enum value 'mp4'"):
        pipe(PROMPT, output_type="mp4", **SMALL)


def test_what_a_pipeline_of_diffusers_has_besides_is_told_of(pipe: wanforge.WanforgePipeline, bundle: Path) -> None:
    with pytest.raises(AttributeError, match="no attribute 'enable_model_cpu_offload': give from_pretrained"):
        pipe.enable_model_cpu_offload()
    with pytest.raises(AttributeError, match=r"no attribute 'xyz'$"):
        _ = pipe.xyz
    with pytest.raises(RequestError, match="torch_dtype has no meaning here: the recipe says"):
        wanforge.WanforgePipeline.from_pretrained(bundle, torch_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="image is of type ndarray; give the name of a file or a picture of Pillow"):
        pipe(PROMPT, np.zeros((4, 4, 3)), **SMALL)
    with pytest.raises(RequestError, match="tiny-t2v has no inputs for a last frame"):
        pipe(PROMPT, last_image=Image.new("RGB", (4, 4)), **SMALL)


def test_a_device_is_the_backends(pipe: wanforge.WanforgePipeline) -> None:
    assert pipe.to("cpu") is pipe
    assert pipe.device.type == "cpu"
    with pytest.raises(ConfigError, match="the backend ort computes on cpu, not on cuda; choose another one"):
        pipe.to("cuda")


@pytest.mark.slow
def test_a_picture_is_the_first_frame(bundle_of: BundleOf, picture: Path) -> None:
    pipe = wanforge.WanforgePipeline.from_pretrained(bundle_of("tiny-i2v", "w8a8").root, backend="ort")
    asked = {**SMALL, "topk": 1.0}
    by_name, opened = (pipe(prompt=PROMPT, image=image, **asked).frames for image in (picture, Image.open(picture)))
    assert np.array_equal(by_name, opened)
    with pytest.raises(RequestError, match="needs an image"):
        pipe(PROMPT, **asked)


@pytest.fixture
def with_loras(bundle: Path, tmp_path: Path) -> wanforge.WanforgePipeline:
    """A pipeline on a copy of the bundle, in which merged weights are kept."""
    shutil.copytree(bundle, tmp_path / "bundle")
    return wanforge.WanforgePipeline.from_pretrained(tmp_path / "bundle", backend="ort")


@pytest.mark.slow
def test_loras_act_by_name_as_in_a_request(with_loras: wanforge.WanforgePipeline, tmp_path: Path) -> None:
    pipe = with_loras
    for name, seed in (("kite", 1), ("sea", 2)):
        (tmp_path / name).mkdir()
        lora(tmp_path / name / "style.safetensors", size=0.5, seed=seed)
    plain = pipe(PROMPT, **SMALL).frames
    pipe.load_lora_weights(tmp_path / "kite", adapter_name="kite")
    pipe.load_lora_weights(tmp_path / "sea", weight_name="style.safetensors", adapter_name="sea")
    assert pipe.get_active_adapters() == ["sea"]
    pipe.set_adapters(["kite", "sea"], [0.5, 1.0])
    loras = [f"{tmp_path}/kite/style.safetensors:0.5", f"{tmp_path}/sea/style.safetensors:1"]
    same = pipe.pipeline.generate(PROMPT, size=(96, 64), frames=5, steps=1, loras=loras).frames
    both = pipe(PROMPT, **SMALL)
    assert np.array_equal(both.clips[0].frames, same)
    assert not np.array_equal(both.frames, plain)
    pipe.set_adapters("sea")
    assert not np.array_equal(pipe(PROMPT, **SMALL).frames, both.frames)
    pipe.delete_adapters("sea")
    assert np.array_equal(pipe(PROMPT, **SMALL).frames, plain)
    pipe.set_adapters("kite")
    pipe.unload_lora_weights()
    assert np.array_equal(pipe(PROMPT, **SMALL).frames, plain)
    with pytest.raises(RequestError, match="no adapter is called 'kite'"):
        pipe.set_adapters("kite")


def test_a_lora_that_cannot_be_used_is_refused_when_it_is_loaded(
    pipe: wanforge.WanforgePipeline, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"holds 0 \.safetensors files; name one with weight_name"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(RequestError, match="is no folder here; give the folder that holds style"):
        pipe.load_lora_weights("someone/style", weight_name="style.safetensors")
    (tmp_path / "style.safetensors").write_bytes(b"no tensors")
    with pytest.raises((CheckpointError, RequestError)):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(RequestError, match="has one denoiser; leave out load_into_transformer_2"):
        pipe.load_lora_weights(tmp_path, load_into_transformer_2=True)
    lora(tmp_path / "style.safetensors")
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    with pytest.raises(RequestError, match="an adapter is called 'style' already"):
        pipe.load_lora_weights(tmp_path, adapter_name="style")
    with pytest.raises(RequestError, match="there are 2 weights for 1 adapters"):
        pipe.set_adapters("style", [1.0, 2.0])


def test_a_lora_without_a_name_gets_one_that_is_free(pipe: wanforge.WanforgePipeline, tmp_path: Path) -> None:
    place = lora(tmp_path / "style.safetensors")
    for _ in range(2):
        pipe.load_lora_weights(place)
    pipe.delete_adapters("default_0")
    for name in ("default_0", "default_2"):
        pipe.load_lora_weights(place)
        assert pipe.get_active_adapters() == [name]


@pytest.mark.slow
def test_loras_of_two_experts_share_a_name(bundle_of: BundleOf, tmp_path: Path) -> None:
    pipe = wanforge.WanforgePipeline.from_pretrained(bundle_of("tiny-i2v", "w8a8").root, backend="ort")
    lora(tmp_path / "style.safetensors", "tiny-i2v")
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    pipe.load_lora_weights(tmp_path, adapter_name="style", load_into_transformer_2=True)
    assert [(each.expert, each.strength) for each in pipe.active_loras()] == [("high", 1.0), ("low", 1.0)]


@pytest.mark.slow
def test_a_model_by_its_name_becomes_a_bundle_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pipe = wanforge.WanforgePipeline.from_pretrained("tinywan")
    assert pipe("a red circle moving right", num_frames=1, num_inference_steps=1).frames.shape == (1, 1, 112, 128, 3)
    assert pipe.pipeline.backend.name == "ort"
    manifest = tmp_path / "wanforge" / "bundles" / "tinywan-w8a8" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    wanforge.WanforgePipeline.from_pretrained("tinywan")
    assert manifest.stat().st_mtime_ns == written


def test_what_is_neither_a_bundle_nor_a_model_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BundleError, match="no model is called 'tinywann'; did you mean tinywan"):
        wanforge.WanforgePipeline.from_pretrained("tinywann")
    with pytest.raises(BundleError, match="not a bundle"):
        wanforge.WanforgePipeline.from_pretrained(tmp_path)
    with pytest.raises(BundleError, match="is a bundle, whose recipe is settled; leave out recipe"):
        wanforge.WanforgePipeline.from_pretrained(bundle, recipe="w8a8")
    with pytest.raises(CheckpointError, match=r"fetch them with: wanforge pull turbowan2\.1-t2v-1\.3b-480p"):
        wanforge.WanforgePipeline.from_pretrained("turbowan2.1-t2v-1.3b-480p")
