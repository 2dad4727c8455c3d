"""The baseline that runs HuggingFace diffusers with a bundle's weights computes the same as the reference."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from tests.numerics import assert_matches
from wanforge.cli import cli
from wanforge.configs.clip import ClipShape
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ResourceError
from wanforge.plugins.nvfp4_linear import reference as nvfp4
from wanforge.requirements import install_package
from wanforge.runtime.backends import create_backend
from wanforge.runtime.measure.baselines import create_baseline
from wanforge.runtime.measure.baselines import diffusers as baseline
from wanforge.runtime.memory.weights import Weights
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.reference.dit import DiT
from wanforge.runtime.request import Request, Timings

BundleOf = Callable[[str, str], Bundle]
PROMPT = "A red kite turns slowly over a windy beach."
SHAPE = ClipShape(96, 64, 9)
TOLERANCE = 1e-5
"""Only the order of float32 sums differs, as where the networks themselves are compared; the sinusoid is the same."""


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the GPU, on which the baseline would compute in bfloat16; the reference uses float32 on the CPU here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def pipelines(bundle: Bundle) -> tuple[Pipeline, Pipeline]:
    """The pipelines of the reference and of the baseline."""
    return Pipeline(bundle, create_backend("torch", bundle)), Pipeline(bundle, create_baseline("diffusers", bundle))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-t2v", "tiny-i2v"])
def test_every_step_and_frame_is_the_references(bundle_of: BundleOf, picture: Path, model: str) -> None:
    request = Request(PROMPT, SHAPE, picture if model == "tiny-i2v" else None, steps=4)
    velocities, frames, channels = [], [], []
    for pipeline in pipelines(bundle_of(model, "bf16")):
        job = pipeline.check(request)
        denoiser = pipeline.denoiser(job, Timings())
        noise = next(pipeline.noise(job))
        # This runs both experts, where there are two, and never two steps on the same latents.
        velocities.append([denoiser(noise * (1 - 0.2 * step.index), step) for step in job.steps])
        channels.append(denoiser.channels)
        frames.append(torch.stack(list(pipeline.frames(noise.double(), SHAPE, Timings()))))
    assert len({step.expert for step in job.steps}) == (2 if model == "tiny-i2v" else 1)
    for expected, found in zip(*velocities, strict=True):
        assert_matches(found, expected, TOLERANCE)
    if model == "tiny-i2v":
        assert_matches(channels[1], channels[0], TOLERANCE)
    apart = (frames[0].int() - frames[1].int()).abs()
    # A value halfway between two bytes may be rounded to either.
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 1e-3


def multiplied_out(stored: Mapping[str, Tensor], layer: str) -> Tensor:
    """The weight that a layer's quantised weight stands for."""
    if f"{layer}fp4_weight" in stored:
        return nvfp4.dequantise(*(stored[f"{layer}{part}"] for part in ("fp4_weight", "scale", "global_scale")))
    if f"{layer}fp8_weight" in stored:
        return stored[f"{layer}fp8_weight"].float() * stored[f"{layer}scale"][:, None]
    steps, scale = (stored[f"{layer}{part}"] for part in ("int8_weight", "scale"))
    factors = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return steps * factors[: steps.shape[0], : steps.shape[1]]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "fp8-row", "nvfp4"])
def test_a_quantised_bundle_runs_on_its_weights_multiplied_out(bundle_of: BundleOf, recipe: str) -> None:
    bundle = bundle_of("tiny-t2v", recipe)
    stored = Weights(bundle).component("dit")
    with torch.device("meta"):
        dense = DiT(bundle.model.dit, load_recipe("bf16"))
    state = {}
    for name in dense.state_dict():
        state[name] = stored[name] if name in stored else multiplied_out(stored, name.removesuffix("weight"))
    dense.load_state_dict(state, assign=True)
    pipeline = Pipeline(bundle, create_baseline("diffusers", bundle))
    job = pipeline.check(Request(PROMPT, SHAPE, steps=1, topk=1.0))
    noise = next(pipeline.noise(job)).float()
    found = pipeline.denoiser(job, Timings())(noise, job.steps[0])
    text = pipeline.embed(job.ids)
    with torch.inference_mode():
        expected = dense(noise, torch.tensor([job.steps[0].timestep]), text)
    assert_matches(found, expected, TOLERANCE)


def bench(bundle: Bundle, *options: str) -> str:
    command = ["bench", str(bundle.root), "--frames", "1", "--steps", "1", "--repeats", "1", *options]
    done = CliRunner().invoke(cli, [*command, "--backend", "torch", "--baseline", "diffusers"])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.slow
def test_the_report_has_its_row_and_says_what_it_runs(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    said = bench(bundle, "--topk", "1")
    assert "diffusers / torch" in said
    assert "diffusers: transformer and VAE of diffusers" in said
    for difference in ("text encoder of the reference", "dense attention in place", "quantised weights dequantised"):
        assert difference in said
    plain = json.loads(bench(bundle_of("tiny-t2v", "bf16"), "--json"))
    assert [row["contender"] for row in plain["rows"]] == ["torch", "diffusers"]
    assert list(plain["rows"][0]["stages"]) == list(plain["rows"][1]["stages"])
    assert [";" in row["note"] for row in plain["rows"]] == [False, False]
    assert plain["missing"] == {}


@pytest.mark.slow
def test_without_diffusers_it_is_left_out_and_said_so(bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    said = bench(bundle_of("tiny-t2v", "bf16"))
    assert "diffusers: not timed, diffusers' Wan networks cannot be imported" in said
    assert f"run: {install_package('diffusers')}" in said


@pytest.mark.slow
def test_too_little_memory_for_the_weights_is_said_before_they_are_read(
    bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "available_bytes", lambda: 1e6)
    with pytest.raises(ResourceError, match="leave out this baseline"):
        create_baseline("diffusers", bundle_of("tiny-t2v", "bf16"))
