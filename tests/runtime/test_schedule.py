"""Schedules describe buffers and graph runs as data; computing some values only once changes no result."""

import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.numerics import assert_matches, relative_rms
from wanforge.configs.clip import ClipShape
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.plugins.dense_attention.reference import dense_attention
from wanforge.runtime.backends import create_backend
from wanforge.runtime.graphs import graphs
from wanforge.runtime.memory.weights import Weights
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.reference.dit import DiT
from wanforge.runtime.request import Request, Timings, latent_shape
from wanforge.runtime.schedule import (
    STAND_INS,
    context_rows,
    denoise_schedule,
    text_schedule,
    vae_schedule,
    weight_biases,
)

BundleOf = Callable[[str, str], Bundle]
SHAPE = ClipShape(96, 64, 9)
PROMPT = "A red kite turns slowly over a windy beach at dusk."


@given(prompt=st.integers(1, 512), tile=st.sampled_from([1, 64, 128]))
def test_few_rows_stand_for_every_row_of_the_text(prompt: int, tile: int) -> None:
    kept, biases = context_rows(prompt, 512, tile)
    assert len(kept) == len(biases) <= min(512, prompt + 2 * STAND_INS)
    assert kept[:prompt] == list(range(prompt))
    assert biases[:prompt] == [0.0] * prompt
    weights: dict[int, float] = defaultdict(float)
    for row, bias in zip(kept, biases, strict=True):
        weights[row] += math.exp(bias)
    assert sum(weights.values()) == pytest.approx(512, rel=1e-7)
    # A kept row of padding stands either for rows of its own tile or for whole tiles of padding.
    for row, weight in weights.items():
        tiles = {r // tile for r in range(row, row + round(weight))}
        assert len(tiles) == 1 or row % tile == 0


@given(count=st.integers(1, 4096))
def test_biases_are_exact_in_every_compute_type_and_weigh_what_they_stand_for(count: int) -> None:
    biases = torch.tensor(weight_biases(count), dtype=torch.float64)
    assert float(biases.exp().sum()) == pytest.approx(count, rel=1e-7)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(biases.to(dtype).double(), biases)


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("prompt", [1, 26, 128, 200, 512])
def test_attention_over_few_rows_is_attention_over_all(prompt: int, multiple: int) -> None:
    torch.manual_seed(prompt)
    # In float64, so that only errors of the weights show.
    q, keys, values = (torch.randn(1, n, 2, 128, dtype=torch.float64) for n in (50, 512, 512))
    keys[:, prompt:], values[:, prompt:] = keys[:, -1:].clone(), values[:, -1:].clone()
    kept, biases = context_rows(prompt, 512, 1, multiple)
    assert len(kept) % multiple == 0
    assert len(kept) == len(biases) <= prompt + STAND_INS + multiple
    few = dense_attention(q, keys[:, kept], values[:, kept], torch.tensor(biases, dtype=torch.bfloat16))
    assert_matches(few, dense_attention(q, keys, values), 1e-7)


@pytest.mark.parametrize("prompt", [60, 128, 200])
def test_few_rows_cost_no_accuracy_in_bfloat16(prompt: int) -> None:
    """With one row for all of the padding, the error is 1.26, 1.86 and 1.39 times that with every row."""
    torch.manual_seed(prompt)
    q, keys, values = (torch.randn(1, n, 2, 128).to(torch.bfloat16) for n in (200, 512, 512))
    keys[:, prompt:], values[:, prompt:] = keys[:, -1:].clone(), values[:, -1:].clone()
    exact = dense_attention(q.double(), keys.double(), values.double())
    kept, biases = context_rows(prompt, 512, 1)
    few = dense_attention(q, keys[:, kept], values[:, kept], torch.tensor(biases))
    assert relative_rms(few, exact) < 1.1 * relative_rms(dense_attention(q, keys, values), exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "recipe", "tolerance"),
    [
        ("tiny-t2v", "bf16", 2e-6),
        ("tiny-t2v", "bf16-sla", 2e-6),
        ("tiny-i2v", "bf16-sla", 2e-6),
        # The last bit of the softmax changes rounding decisions, which 8-bit layers amplify.
        ("tiny-t2v", "w8a8", 2e-2),
    ],
)
def test_computing_once_changes_nothing(
    bundle_of: BundleOf, model: str, recipe: str, tolerance: float, picture: object
) -> None:
    """The schedule (keys and values once per prompt, equal rows as one, modulation once per step) gives the same as the
    plain network, which computes everything at every step on all 512 rows."""
    bundle = bundle_of(model, recipe)
    pipeline = Pipeline(bundle, create_backend("torch", bundle))
    image = picture if bundle.model.task == "i2v" else None
    job = pipeline.check(Request(PROMPT, SHAPE, image, topk=0.5 if recipe != "bf16" else None))  # type: ignore[arg-type]
    denoiser = pipeline.denoiser(job, Timings())
    text = pipeline.embed(job.ids)
    for step in job.steps:
        latents = torch.randn(latent_shape(pipeline.model, SHAPE), dtype=torch.float64)
        with torch.device("meta"):
            dit = DiT(bundle.model.dit, bundle.recipe)
        component = f"dit.{step.expert}" if step.expert else "dit"
        dit.load_state_dict(Weights(bundle).component(component), assign=True)
        x = latents.float() if denoiser.channels is None else torch.cat((latents.float(), denoiser.channels), 1)
        with torch.inference_mode():
            expected = dit(x, torch.tensor([step.timestep]), text, num_selected=job.num_selected)
        assert_matches(denoiser(latents, step), expected, tolerance, name=f"step {step.index}")


def test_keys_and_values_are_made_once_per_prompt_and_modulation_once_per_step() -> None:
    model, recipe = load_model("tiny-i2v"), load_recipe("w8a8")
    found = graphs(model, recipe)
    steps = ["high", "high", "low", "low"]
    schedule = denoise_schedule(model, found, SHAPE, steps, context_rows=12, num_selected=1)
    layers = model.dit.num_layers
    count = lambda program: [graph_run.graph for graph_run in schedule.programs[program]]  # noqa: E731
    assert count("prompt") == ["context", *["cross_kv"] * layers] * 2
    assert count("times") == ["time"] * 4
    for index, expert in enumerate(steps):
        assert count(f"step.{index}") == ["stem", *["block"] * layers, "head"]
        assert {graph_run.component for graph_run in schedule.programs[f"step.{index}"]} == {f"dit.{expert}"}
    # A layer does not write into the buffer that it reads.
    for graph_run in schedule.programs["step.0"]:
        assert not set(graph_run.inputs) & set(graph_run.outputs)
    assert schedule.buffers["keys.low.1"].shape == (1, 12, model.dit.dim)


def test_text_runs_at_the_prompts_length() -> None:
    model = load_model("tiny-t2v")
    schedule = text_schedule(model, graphs(model, load_recipe("bf16")), 7)
    assert schedule.buffers["embedding"].shape == (1, 7, model.text_encoder.dim)
    prefixes = [graph_run.prefix for graph_run in schedule.programs["text"] if graph_run.graph == "text_block"]
    assert prefixes == ["blocks.0.", "blocks.1."]


@pytest.mark.parametrize("half", ["decode", "encode"])
def test_caches_go_back_and_forth(half: str) -> None:
    model = load_model("tiny-i2v")
    schedule = vae_schedule(graphs(model, load_recipe("bf16")), SHAPE, half)
    (first,), (even,), (odd,) = (schedule.programs[name] for name in ("first", "next.0", "next.1"))
    assert first.outputs[1:] == even.inputs[1:] == odd.outputs[1:]
    assert even.outputs[1:] == odd.inputs[1:]
    assert not set(even.inputs) & set(even.outputs)


@pytest.mark.slow
def test_every_output_is_written(bundle_of: BundleOf, poisoned: None) -> None:
    bundle = bundle_of("tiny-t2v", "w8a8")
    for name in ("torch", "ort"):
        pipeline = Pipeline(bundle, create_backend(name, bundle))
        job = pipeline.check(Request(PROMPT, SHAPE, topk=0.5))
        latents = pipeline.latents(job, Timings())
        assert torch.isfinite(latents).all()
        assert all(int(frame.max()) > 0 for frame in pipeline.frames(latents, SHAPE, Timings()))


def test_both_backends_run_the_same_schedule_to_the_same_place(bundle_of: BundleOf) -> None:
    bundle = bundle_of("tiny-t2v", "bf16-sla")
    results: list[Tensor] = []
    for name in ("torch", "ort"):
        pipeline = Pipeline(bundle, create_backend(name, bundle))
        results.append(pipeline.latents(pipeline.check(Request(PROMPT, SHAPE, topk=0.5)), Timings()))
    assert relative_rms(results[1], results[0]) < 1e-5
