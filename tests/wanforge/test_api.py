"""The public functions: what they return, and what they refuse."""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import wanforge
from tests.video_reader import read_video
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import BundleError, CheckpointError, ConfigError, RequestError
from wanforge.runtime.reference.steps import rcm_times

BundleOf = Callable[[str, str], Bundle]
PROMPT = "A red kite over a windy beach."


@pytest.fixture
def bundle(bundle_of: BundleOf) -> Path:
    return bundle_of("tiny-t2v", "bf16").root


@pytest.fixture
def pipeline(bundle: Path) -> wanforge.Pipeline:
    return wanforge.load(bundle, backend="ort")


@pytest.mark.slow
def test_a_clip_holds_frames_latents_and_timings(pipeline: wanforge.Pipeline) -> None:
    told: list[tuple[str, int, int]] = []
    clip = pipeline.generate(
        PROMPT,
        size=(96, 64),
        frames=5,
        seed=3,
        steps=2,
        on_progress=lambda stage, done, total, unit="": told.append((stage, done, total)),
    )
    assert clip.frames.shape == (5, 64, 96, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.min() < clip.frames.max()
    assert (clip.latents.shape, clip.latents.dtype) == ((1, 16, 2, 8, 12), torch.float64)
    assert (clip.request.seed, clip.request.steps, clip.backend, clip.fps) == (3, 2, "ort", 16)
    assert len(clip.timings.steps) == 2
    assert clip.timings.total == pytest.approx(sum(clip.timings.stages.values()))
    assert ("decode", 2, 2) in told
    assert all(0 < done <= total for _, done, total in told)


def test_settings_reach_the_clip(pipeline: wanforge.Pipeline) -> None:
    small = {"size": "96x64", "frames": 1, "steps": 1}
    first, again, other = (pipeline.generate(PROMPT, seed=seed, **small).frames for seed in (0, None, 1))  # type: ignore[arg-type]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_clip_is_saved_whole_or_not_at_all(pipeline: wanforge.Pipeline, tmp_path: Path) -> None:
    clip = pipeline.generate(PROMPT, size=(96, 64), frames=5, steps=1)
    saved = clip.save(str(tmp_path / "clip.mp4"))
    properties, decoded = read_video(saved)
    assert (properties["size"], properties["fps"]) == ((96, 64), 16)
    assert decoded.shape == clip.frames.shape
    assert np.abs(decoded.numpy().astype(float) - clip.frames).mean() < 20
    with pytest.raises(RequestError, match="mp4"):
        clip.save(tmp_path / "clip.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.slow
def test_an_image_may_be_a_path_or_a_picture(bundle_of: BundleOf, picture: Path) -> None:
    from PIL import Image

    pipeline = wanforge.load(bundle_of("tiny-i2v", "w8a8").root, backend="ort")
    small = {"size": (96, 64), "frames": 1, "steps": 1, "topk": 1.0}
    clips = [pipeline.generate(PROMPT, image, **small) for image in (picture, str(picture), Image.open(picture))]  # type: ignore[arg-type]
    assert np.array_equal(clips[0].frames, clips[1].frames)
    assert np.array_equal(clips[0].frames, clips[2].frames)
    with pytest.raises(RequestError, match="needs an image"):
        pipeline.generate(PROMPT, frames=1)


def test_what_cannot_be_loaded_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no backend is called 'tensorflow'"):
        wanforge.load(bundle, backend="tensorflow")
    with pytest.raises(BundleError, match="not a bundle"):
        wanforge.load(tmp_path)


def test_a_checkpoint_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lack a tokenizer"):
        wanforge.import_checkpoint(tmp_path / "bundle", "tiny-t2v", {"dit": tmp_path / "dit.pth"})
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_a_checkpoint_may_be_a_folder_or_several(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["tiny-t2v"]
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "own.pth").symlink_to(folder / "tiny-t2v.pth")
    (tmp_path / "rest").mkdir()
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"):
        (tmp_path / "rest" / Path(name).name).symlink_to(folder / name)
    one = wanforge.import_checkpoint(tmp_path / "one", files=str(folder))
    several = wanforge.import_checkpoint(tmp_path / "several", files=[tmp_path / "dit", tmp_path / "rest"])
    assert [(each.model.name, each.recipe.name) for each in (one, several)] == [
        ("tiny-t2v", "w8a8"),
        ("tiny-t2v", "bf16-sla"),
    ]
    assert several.manifest.files["weights/dit.safetensors"].source == str(tmp_path / "dit" / "own.pth")
    with pytest.raises(CheckpointError, match=r"no dit\.high, dit\.low of tiny-i2v here"):
        wanforge.import_checkpoint(tmp_path / "other", "tiny-i2v", folder)
    assert not (tmp_path / "other").exists()


def test_the_model_of_named_files_is_guessed(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["tiny-i2v"]
    files = {"dit.high": folder / "tiny-i2v-high.pth", "dit.low": folder / "tiny-i2v-low.pth"}
    files |= {"vae": folder / "Wan2.1_VAE.pth", "text_encoder": folder / "models_t5_umt5-xxl-enc-bf16.pth"}
    bundle = wanforge.import_checkpoint(tmp_path / "b", files={**files, "tokenizer": folder / "google" / "umt5-xxl"})
    assert bundle.model.name == "tiny-i2v"
    with pytest.raises(CheckpointError, match=r"lack a denoiser: give dit, or dit\.high and dit\.low; or say which"):
        wanforge.import_checkpoint(tmp_path / "c", files={"vae": folder / "Wan2.1_VAE.pth"})


@pytest.mark.slow
def test_parity_says_whether_every_limit_is_met(bundle: Path) -> None:
    found = wanforge.parity(bundle, PROMPT, backend="ort", depths=["block"], size=(96, 64), frames=1, steps=1)
    assert found.passed
    assert {comparison.place.depth for comparison in found.comparisons} == {"block"}
    assert found.request.prompt == PROMPT


def test_parity_without_a_prompt_uses_the_models_example(bundle: Path) -> None:
    found = wanforge.parity(bundle, backend="ort", depths=["step"], size=(96, 64), frames=1, steps=1)
    assert found.request.prompt == wanforge.Bundle.open(bundle).model.example_prompt


def test_a_comparison_that_proves_nothing_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the backend torch would be compared with itself"):
        wanforge.parity(bundle, PROMPT, backend="torch", frames=1)
    imported = wanforge.import_checkpoint(tmp_path / "bundle")
    with pytest.raises(ConfigError, match=r"compared with itself; .* ort \(the bundle has no fp32 graphs; .*export"):
        wanforge.parity(imported.root, PROMPT)
    with pytest.raises(ConfigError, match="no depth is called 'clips'; did you mean clip"):
        wanforge.parity(bundle, PROMPT, backend="ort", depths=["op", "clips"])
    with pytest.raises(ConfigError, match="no depth to compare at"):
        wanforge.parity(bundle, PROMPT, backend="ort", depths=[])


def test_times_and_update_take_the_place_of_the_models(pipeline: wanforge.Pipeline) -> None:
    way = {"size": (96, 64), "frames": 1}
    usual = pipeline.generate(PROMPT, steps=2, **way).frames  # type: ignore[arg-type]
    same = pipeline.generate(PROMPT, times=rcm_times(2, 80.0), update="renoise", **way).frames  # type: ignore[arg-type]
    assert np.array_equal(same, usual)
    for other in ({"times": (1.0, 0.5)}, {"steps": 2, "update": "euler"}):
        assert not np.array_equal(pipeline.generate(PROMPT, **other, **way).frames, usual)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"step": 1}, r"generate\(\): no parameter is called 'step'; did you mean steps\?"),
        ({"topk": "a"}, r"generate\(\): Expected `float`, got `str` - at `\$\.topk`"),
        ({"size": 128}, r"generate\(\): Expected `str \| array`, got `int` - at `\$\.size`"),
        ({"update": "euler1"}, r"generate\(\): Invalid enum value 'euler1' - at `\$\.update`"),
        ({"frames": 5.5}, r"generate\(\): Expected `int`, got `float` - at `\$\.frames`"),
    ],
)
def test_keywords_are_checked(pipeline: wanforge.Pipeline, settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        pipeline.generate(PROMPT, **settings)  # type: ignore[arg-type]


def test_the_signature_lists_every_setting() -> None:
    names = list(inspect.signature(wanforge.Pipeline.generate).parameters)
    assert names == [
        "self",
        "prompt",
        "image",
        "last_image",
        "on_progress",
        "size",
        "frames",
        "seed",
        "steps",
        "topk",
        "times",
        "update",
        "guidance_scale",
        "loras",
    ]
    with pytest.raises(TypeError, match="no parameter is called 'recpe'; did you mean recipe"):
        wanforge.import_checkpoint("bundle", recpe="w8a8")  # type: ignore[call-arg]


def test_values_are_checked_before_anything_is_written(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="no compute type is called 'fp31'; did you mean fp32"):
        wanforge.export(bundle, ["fp31"])
    for dtypes in ("fp32", []):
        with pytest.raises(ConfigError, match="is not a list of compute types"):
            wanforge.export(bundle, dtypes)
    with pytest.raises(ConfigError, match="memory must be a finite number of gigabytes above 0"):
        wanforge.load(bundle, backend="ort", memory=-1)
    for memory in (float("nan"), float("inf"), 0.0):
        with pytest.raises(ConfigError, match="memory must be a finite number"):
            wanforge.load(bundle, backend="ort", memory=memory)
    with pytest.raises(CheckpointError, match="no component of tiny-t2v is called 'ditt'; did you mean dit"):
        wanforge.import_checkpoint("new", "tiny-t2v", {"ditt": "a", "tokenizer": "b"})
    with pytest.raises(ConfigError, match="no target is called 'rtx1'"):
        wanforge.build(bundle, ["rtx5090", "rtx1"])
    assert issubclass(ConfigError, wanforge.WanforgeError)


def test_targets_are_checked_before_anything_is_built(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="rtx5090"):
        wanforge.build(bundle, "rtx5091")


def test_names_that_do_not_exist_are_named() -> None:
    with pytest.raises(AttributeError, match="module 'wanforge' has no attribute 'compile'"):
        _ = wanforge.compile
