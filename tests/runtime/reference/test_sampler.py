"""The sampler reproduces upstream's recorded runs bit for bit."""

import itertools
from collections.abc import Iterator

import msgspec
import pytest
import torch
from torch import Tensor

from tests import golden
from tests.numerics import assert_matches
from wanforge.configs.sampler import SamplerConfig
from wanforge.errors import RequestError
from wanforge.runtime.reference.sampler import gaussian, sample
from wanforge.runtime.reference.steps import Step, Trajectory, rcm_times, trajectory

RUNS = [
    "sampler_t2v_1",
    "sampler_t2v_2",
    "sampler_t2v_3",
    "sampler_t2v_4",
    "sampler_i2v_ode_4",
    "sampler_i2v_sde_2",
    "sampler_i2v_sde_4",
]


def rcm(num_steps: int, sigma_max: float, boundary: float | None = None, *, is_ode: bool = False) -> Trajectory:
    """A trajectory by rCM's rule."""
    sampler = SamplerConfig(sigma_max=sigma_max, boundary=boundary, update="euler" if is_ode else "renoise")
    return trajectory(sampler, num_steps)


def recorded_noise(case: golden.Case) -> Iterator[Tensor]:
    yield case["input:init_noise"]
    for index in itertools.count():
        # The last step multiplies its noise by zero; where it was not stored, anything will do.
        yield case.tensors.get(f"input:noise_step{index}", case["input:init_noise"])


@pytest.mark.parametrize("name", RUNS)
def test_states_equal_upstreams_to_the_bit(name: str) -> None:
    case = golden.load(name)
    arguments = case.arguments
    way = rcm(arguments["num_steps"], arguments["sigma_max"], arguments["boundary"], is_ode=arguments["ode"])
    steps = way.steps
    assert [step.time for step in steps] == case["output:t_steps_f64"].tolist()[:-1]
    assert [step.timestep for step in steps] == case["output:timesteps_bf16"].tolist()
    assert [step.expert or "net" for step in steps] == arguments["experts"]

    def denoise(latents: Tensor, step: Step) -> Tensor:
        assert_matches(latents, case[f"mid:x_before_step{step.index}_f64"], 0, name=f"before step {step.index}")
        return case[f"mid:velocity_step{step.index}"]

    final = sample(denoise, way, recorded_noise(case))
    assert_matches(final, case["output:x_final_f64"], 0)


def test_schedules_equal_upstreams() -> None:
    for entry in golden.load_json("sampler_schedule"):
        steps = rcm(entry["num_steps"], entry["sigma_max"]).steps
        times = [step.time for step in steps] + [steps[-1].next_time]
        assert times == pytest.approx(entry["t_steps"], abs=1e-15)
        assert [step.timestep for step in steps] == entry["timesteps_after_bf16"]


@pytest.mark.parametrize(("sigma_max", "first"), [(80.0, 988.0), (200.0, 996.0), (1600.0, 1000.0)])
def test_the_network_is_told_the_specifications_timesteps(sigma_max: float, first: float) -> None:
    assert [step.timestep for step in rcm(4, sigma_max).steps] == [first, 932.0, 852.0, 608.0]


@pytest.mark.parametrize(
    ("steps", "experts"),
    [(1, ["high"]), (2, ["high", "high"]), (3, ["high", "high", "low"]), (4, ["high", "high", "low", "low"])],
)
def test_the_low_noise_expert_takes_over_below_the_boundary(steps: int, experts: list[str]) -> None:
    assert [step.expert for step in rcm(steps, 200.0, 0.9).steps] == experts


@pytest.mark.parametrize("is_ode", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_a_perfect_denoiser_finds_the_data(num_steps: int, is_ode: bool) -> None:
    data = torch.randn(1, 16, 2, 4, 4, dtype=torch.float64)

    def perfect(latents: Tensor, step: Step) -> Tensor:
        return (latents - data) / step.time

    final = sample(perfect, rcm(num_steps, 80.0, is_ode=is_ode), gaussian((1, 16, 2, 4, 4), 0))
    assert_matches(final, data, 1e-12)


def test_ode_draws_noise_once_and_sde_once_more_per_step() -> None:
    for is_ode, draws in ((True, 1), (False, 5)):
        way = rcm(4, 80.0, is_ode=is_ode)
        assert way.draws == draws
        noise = iter([torch.zeros(1, 16, 1, 2, 2)] * draws)
        sample(lambda latents, step: latents, way, noise)
        assert next(noise, None) is None


def test_a_seed_means_the_same_noise_everywhere() -> None:
    first, second = itertools.islice(gaussian((2, 3), 7), 2)
    again = next(gaussian((2, 3), 7))
    assert_matches(again, first, 0)
    assert not torch.equal(first, second)
    # The noise comes from PyTorch's CPU generator, whose stream is part of its interface.
    assert first[0].tolist() == pytest.approx(torch.randn(3, generator=torch.Generator().manual_seed(7)).tolist())


@pytest.mark.parametrize(
    ("steps", "sigma_max"), [(0, 80.0), (5, 80.0), (4, 14.0), (2, float("inf")), (1, -1.0), (4, float("nan"))]
)
def test_refuses_schedules_the_models_were_not_made_for(steps: int, sigma_max: float) -> None:
    with pytest.raises(RequestError):
        rcm_times(steps, sigma_max)


LIGHTX2V = SamplerConfig(
    times=(1.0, 15 / 16, 5 / 6, 5 / 8), update="euler", start="one", timestep="float32", low_from=2
)
SELF_FORCING = SamplerConfig(times=LIGHTX2V.times, start="one", timestep="float32")
FASTWAN = SamplerConfig(steps=3, times=(1.0, 0.757, 0.522), start="one", timestep="integer")


@pytest.mark.parametrize(
    ("sampler", "timesteps", "experts"),
    [
        (LIGHTX2V, [1000.0, 937.5, 833.3333, 625.0], ["high", "high", "low", "low"]),
        (SELF_FORCING, [1000.0, 937.5, 833.3333, 625.0], [""] * 4),
        (FASTWAN, [1000.0, 757.0, 522.0], [""] * 3),
    ],
)
def test_other_families_have_their_own_times(
    sampler: SamplerConfig, timesteps: list[float], experts: list[str]
) -> None:
    way = trajectory(sampler)
    assert [step.timestep for step in way.steps] == pytest.approx(timesteps, abs=1e-4)
    assert [step.expert for step in way.steps] == experts
    assert (way.start, way.steps[-1].next_time) == (1.0, 0.0)


def lightx2v(noise: Tensor, velocities: list[Tensor]) -> Tensor:
    """LightX2V's steps as its specification writes them: a warped list of steps, and Euler in float32."""
    sigmas = [5 * b / (1 + 4 * b) for b in (1.0, 0.75, 0.5, 0.25)] + [0.0]
    latents = noise
    for velocity, (sigma, after) in zip(velocities, itertools.pairwise(sigmas), strict=True):
        latents = latents + (after - sigma) * velocity
    return latents


def distribution_matching(noise: list[Tensor], velocities: list[Tensor], sigmas: list[float]) -> Tensor:
    """The steps of FastWan and Self-Forcing: find the clean latents, and mix them with fresh noise."""
    latents = noise[0]
    for place, (velocity, sigma) in enumerate(zip(velocities, sigmas, strict=True)):
        clean = latents - sigma * velocity
        after = sigmas[place + 1] if place + 1 < len(sigmas) else 0.0
        latents = (1 - after) * clean + after * noise[place + 1]
    return latents


@pytest.mark.parametrize("sampler", [LIGHTX2V, SELF_FORCING, FASTWAN])
def test_other_families_take_the_steps_of_their_specification(sampler: SamplerConfig) -> None:
    noise = list(itertools.islice(gaussian((1, 16, 2, 4, 4), 3), 5))
    velocities = list(itertools.islice(gaussian((1, 16, 2, 4, 4), 4), sampler.steps))
    found = sample(lambda latents, step: velocities[step.index], trajectory(sampler), iter(noise))
    if sampler.update == "euler":
        expected = lightx2v(noise[0], velocities)
    else:
        expected = distribution_matching(noise, velocities, list(sampler.times))
    assert_matches(found, expected.double(), 1e-6)


def test_a_request_may_bring_times_and_an_update_of_its_own() -> None:
    way = trajectory(SamplerConfig(boundary=0.9), times=(0.95, 0.5), update="euler")
    assert [(step.time, step.next_time, step.expert) for step in way.steps] == [(0.95, 0.5, "high"), (0.5, 0.0, "low")]
    assert (way.start, way.draws) == (0.95, 1)


@pytest.mark.parametrize(
    ("sampler", "steps", "times", "said"),
    [
        (FASTWAN, 2, None, "2 steps, but its sampler has 3 times"),
        (FASTWAN, 3, (1.0, 0.5), "3 steps, but there are 2 times"),
        (FASTWAN, None, (1.0, 0.8, 0.6, 0.4), "4 times; this model is sampled in 1 to 3 steps"),
        (FASTWAN, None, (0.5, 0.5), "do not decrease"),
        (FASTWAN, None, (1.5, 0.5), "do not decrease"),
        (FASTWAN, None, (), "0 times"),
        (SamplerConfig(), 5, None, "distilled for 1 to 4"),
    ],
)
def test_refuses_steps_that_do_not_fit(
    sampler: SamplerConfig, steps: int | None, times: tuple[float, ...] | None, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        trajectory(sampler, steps, times)


@pytest.mark.parametrize(
    "fields",
    [
        {"times": (0.5, 0.6), "steps": 2},
        {"times": (1.0, 0.5)},
        {"steps": 5},
        {"boundary": 0.9, "low_from": 2},
    ],
)
def test_samplers_that_make_no_sense_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"decrease|times|both"):
        msgspec.convert(fields, SamplerConfig)
