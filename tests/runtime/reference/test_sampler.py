"""The sampler reproduces upstream's recorded runs bit for bit."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests import golden
from tests.numerics import assert_matches
from wanforge.errors import RequestError
from wanforge.runtime.reference.sampler import gaussian, sample
from wanforge.runtime.reference.steps import Step, schedule

RUNS = [
    "sampler_t2v_1",
    "sampler_t2v_2",
    "sampler_t2v_3",
    "sampler_t2v_4",
    "sampler_i2v_ode_4",
    "sampler_i2v_sde_2",
    "sampler_i2v_sde_4",
]


def recorded_noise(case: golden.Case) -> Iterator[Tensor]:
    yield case["input:init_noise"]
    for index in itertools.count():
        # The last step multiplies its noise by zero; where it was not stored, anything will do.
        yield case.tensors.get(f"input:noise_step{index}", case["input:init_noise"])


@pytest.mark.parametrize("name", RUNS)
def test_states_equal_upstreams_to_the_bit(name: str) -> None:
    case = golden.load(name)
    arguments = case.arguments
    steps = schedule(arguments["num_steps"], arguments["sigma_max"], arguments["boundary"])
    assert [step.time for step in steps] == case["output:t_steps_f64"].tolist()[:-1]
    assert [step.timestep for step in steps] == case["output:timesteps_bf16"].tolist()
    assert [step.expert or "net" for step in steps] == arguments["experts"]

    def denoise(latents: Tensor, step: Step) -> Tensor:
        assert_matches(latents, case[f"mid:x_before_step{step.index}_f64"], 0, name=f"before step {step.index}")
        return case[f"mid:velocity_step{step.index}"]

    final = sample(denoise, steps, recorded_noise(case), ode=arguments["ode"])
    assert_matches(final, case["output:x_final_f64"], 0)


def test_schedules_equal_upstreams() -> None:
    for entry in golden.load_json("sampler_schedule"):
        steps = schedule(entry["num_steps"], entry["sigma_max"])
        times = [step.time for step in steps] + [steps[-1].next_time]
        assert times == pytest.approx(entry["t_steps"], abs=1e-15)
        assert [step.timestep for step in steps] == entry["timesteps_after_bf16"]


@pytest.mark.parametrize(("sigma_max", "first"), [(80.0, 988.0), (200.0, 996.0), (1600.0, 1000.0)])
def test_the_network_is_told_the_specifications_timesteps(sigma_max: float, first: float) -> None:
    assert [step.timestep for step in schedule(4, sigma_max)] == [first, 932.0, 852.0, 608.0]


@pytest.mark.parametrize(
    ("steps", "experts"),
    [(1, ["high"]), (2, ["high", "high"]), (3, ["high", "high", "low"]), (4, ["high", "high", "low", "low"])],
)
def test_the_low_noise_expert_takes_over_below_the_boundary(steps: int, experts: list[str]) -> None:
    assert [step.expert for step in schedule(steps, 200.0, 0.9)] == experts


@pytest.mark.parametrize("ode", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_a_perfect_denoiser_finds_the_data(num_steps: int, ode: bool) -> None:
    data = torch.randn(1, 16, 2, 4, 4, dtype=torch.float64)

    def perfect(latents: Tensor, step: Step) -> Tensor:
        return (latents - data) / step.time

    final = sample(perfect, schedule(num_steps, 80.0), gaussian((1, 16, 2, 4, 4), 0), ode=ode)
    assert_matches(final, data, 1e-12)


def test_ode_draws_noise_once_and_sde_once_more_per_step() -> None:
    for ode, draws in ((True, 1), (False, 5)):
        noise = iter([torch.zeros(1, 16, 1, 2, 2)] * draws)
        sample(lambda latents, step: latents, schedule(4, 80.0), noise, ode=ode)
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
        schedule(steps, sigma_max)
