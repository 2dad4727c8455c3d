"""Requests: which of them are refused before anything is computed, and how noise is saved and used again."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.numerics import assert_matches
from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import BundleError, ConfigError, RequestError, ResourceError
from wanforge.runtime.backends import create_backend
from wanforge.runtime.inputs.noise import write_noise
from wanforge.runtime.memory import estimate
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.request import Request, Timings, latent_shape

BundleOf = Callable[[str, str], Bundle]
SHAPE = ClipShape(96, 64, 9)
PROMPT = "A red kite turns slowly over a windy beach."
BAD_SHARES = (0.0, -0.5, 1.01, float("nan"), float("inf"))


@pytest.fixture
def pipeline(bundle_of: BundleOf) -> Pipeline:
    bundle = bundle_of("tiny-t2v", "bf16-sla")
    return Pipeline(bundle, create_backend("ort", bundle))


@pytest.mark.slow
def test_a_seed_gives_the_same_frames_and_another_seed_others(pipeline: Pipeline) -> None:
    def frames(seed: int) -> torch.Tensor:
        latents = pipeline.latents(pipeline.check(Request(PROMPT, SHAPE, seed=seed, topk=0.5)), Timings())
        return torch.stack(list(pipeline.frames(latents, SHAPE, Timings())))

    first = frames(1)
    assert first.shape == (9, 64, 96, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, frames(1))
    assert not torch.equal(first, frames(2))


def test_saved_noise_stands_for_its_seed(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "noise.safetensors"
    write_noise(path, latent_shape(pipeline.model, SHAPE), 5, 4)
    assert list(tmp_path.iterdir()) == [path]
    by_seed, by_file = (
        pipeline.latents(pipeline.check(Request(PROMPT, SHAPE, seed=seed, topk=0.5, noise=noise)), Timings())
        for seed, noise in ((5, None), (99, path))
    )
    assert_matches(by_file, by_seed, 0)


def test_noise_that_does_not_fit_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "noise.safetensors"

    def attempt(steps: int) -> None:
        pipeline.check(Request(PROMPT, SHAPE, steps=steps, topk=0.5, noise=path))

    with pytest.raises(RequestError, match=r"noise\.safetensors: no such file"):
        attempt(4)
    path.write_bytes(b"nonsense")
    with pytest.raises(RequestError, match="not a noise file"):
        attempt(4)
    write_noise(path, latent_shape(pipeline.model, SHAPE), 0, 2)
    attempt(2)
    with pytest.raises(RequestError, match=r"step.2 is missing"):
        attempt(4)
    noise = load_file(path)
    save_file(noise | {"initial": torch.zeros(1, 16, 1, 8, 12)}, path)
    with pytest.raises(RequestError, match=r"initial is \[1, 16, 1, 8, 12\], this request needs \[1, 16, 3, 8, 12\]"):
        attempt(2)


def test_steps_top_k_and_ode_change_the_result(pipeline: Pipeline) -> None:
    def latents(**options: object) -> torch.Tensor:
        job = pipeline.check(Request(PROMPT, SHAPE, **{"topk": 0.5, **options}))  # type: ignore[arg-type]
        return pipeline.latents(job, Timings())

    base = latents()
    for options in ({"steps": 2}, {"topk": 1.0}, {"update": "euler"}, {"sigma_max": 1600.0}):
        assert not torch.equal(latents(**options), base), options


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request("", SHAPE), RequestError, "empty"),
        (Request("kite " * 600, SHAPE), RequestError, "tokens long"),
        (Request(PROMPT, SHAPE, topk=0.1), ConfigError, "selects no block; use at least 0.5"),
        (Request(PROMPT, SHAPE, image=Path("x.png")), RequestError, "takes no image"),
        (Request(PROMPT, SHAPE, topk=0.5, steps=5), RequestError, "1 to 4"),
        (Request(PROMPT, SHAPE, topk=0.5, sigma_max=3.0), RequestError, "above 14.1"),
        (Request(PROMPT, SHAPE, topk=0.5, steps=0), RequestError, "0 steps; .* 1 to 4"),
        (Request(PROMPT, SHAPE, topk=0.5, sigma_max=0.0), RequestError, "sigma_max is 0.0"),
        *((Request(PROMPT, SHAPE, topk=topk), RequestError, "is not a share") for topk in BAD_SHARES),
        *((Request(PROMPT, SHAPE, topk=0.5, seed=seed), RequestError, "use 0 to 1844") for seed in (-1, 1 << 64)),
    ],
)
def test_refuses(pipeline: Pipeline, request_: Request, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipeline.check(request_)


@pytest.mark.parametrize(
    ("width", "height", "frames", "message"),
    [(96, 60, 9, "multiples of 16"), (0, 64, 9, "multiples of 16"), (96, 64, 8, "4n\\+1, for example 5 or 9")],
)
def test_refuses_sizes_the_model_cannot_make(width: int, height: int, frames: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClipShape(width, height, frames)


@pytest.mark.slow
def test_an_image_model_needs_an_image(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-i2v", "bf16-sla")
    with pytest.raises(RequestError, match="--image"):
        Pipeline(bundle, create_backend("ort", bundle)).check(Request(PROMPT, SHAPE))


@pytest.mark.slow
def test_an_image_is_opened_before_anything_is_computed(bundle_of: BundleOf, tmp_path: Path) -> None:
    bundle = bundle_of("tiny-i2v", "bf16-sla")
    pipeline = Pipeline(bundle, create_backend("ort", bundle))
    with pytest.raises(RequestError, match="no such file"):
        pipeline.check(Request(PROMPT, SHAPE, tmp_path / "absent.png", topk=0.5))
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(RequestError, match="not an image"):
        pipeline.check(Request(PROMPT, SHAPE, tmp_path / "text.png", topk=0.5))


def test_the_largest_seed_is_a_seed(pipeline: Pipeline) -> None:
    job = pipeline.check(Request(PROMPT, SHAPE, seed=(1 << 64) - 1, topk=0.5))
    assert next(pipeline.noise(job)).std() == pytest.approx(1, abs=0.1)


def test_noise_is_written_whole_or_not_at_all(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_noise(tmp_path / "noise.safetensors", latent_shape(pipeline.model, SHAPE), 0, 4)
    assert list(tmp_path.iterdir()) == []


def test_top_k_without_sparse_attention_is_refused(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "bf16")
    with pytest.raises(RequestError, match="means nothing"):
        Pipeline(bundle, create_backend("ort", bundle)).check(Request(PROMPT, SHAPE, topk=0.2))


def test_too_little_memory_is_refused_before_anything_starts(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "available_bytes", lambda: 10_000_000)
    with pytest.raises(ResourceError, match=r"needs about 0\.6 GB .* 0\.0 GB are free"):
        pipeline.check(Request(PROMPT, SHAPE, topk=0.5))


def test_unknown_backends_and_types_are_refused(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "bf16")
    with pytest.raises(ConfigError, match="known: torch, ort"):
        create_backend("tpu", bundle)
    with pytest.raises(BundleError, match="not in bfloat16"):
        create_backend("ort", bundle, torch.bfloat16)


@pytest.mark.slow
def test_timings_cover_every_stage(bundle_of: BundleOf, picture: Path) -> None:
    bundle = bundle_of("tiny-i2v", "w8a8")
    pipeline, timings = Pipeline(bundle, create_backend("ort", bundle)), Timings()
    job = pipeline.check(Request(PROMPT, SHAPE, picture, topk=0.5))
    seen: list[tuple[str, int, int]] = []
    latents = pipeline.latents(job, timings, lambda *event: seen.append(event))
    assert len(list(pipeline.frames(latents, SHAPE, timings, lambda *event: seen.append(event)))) == 9
    assert list(timings.stages) == ["text", "condition", "prepare", "denoise", "decode", "transfer"]
    assert len(timings.steps) == 4
    assert sum(timings.steps) <= timings.stages["denoise"]
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["text", "condition", "prepare", "step 1", "step 2", "step 3", "step 4", "decode"]
    for stage in stages[3:]:
        assert [e for e in seen if e[0] == stage][-1][1] == [e for e in seen if e[0] == stage][-1][2]
