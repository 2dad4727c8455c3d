"""rCM sampling: from noise to latents in one to four steps.

The state is float64. The network gets it in the compute type, with a timestep rounded to bfloat16.

Source: rCM (arXiv:2510.08431) as in TurboDiffusion, inference/wan2.1_t2v_infer.py and wan2.2_i2v_infer.py
(docs/sources.md).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from wanforge.errors import RequestError

LATER_ANGLES = (1.5, 1.4, 1.0)
"""TrigFlow times of the steps after the first, in radians."""
MAX_STEPS = 1 + len(LATER_ANGLES)
TIMESTEP_SCALE = 1000.0

Denoiser = Callable[[Tensor, "Step"], Tensor]
"""``(latents, step) -> velocity``: latents in float64, the velocity in their shape and any float type."""


@dataclass(frozen=True)
class Step:
    """One evaluation of the network.

    Attributes:
        index: Number of the step, from 0.
        time: Rectified-flow time before the step, 0 (data) to 1 (noise).
        next_time: Time after the step; 0 for the last one.
        timestep: Time that the network is given, on a scale of 1000, rounded once to bfloat16.
        expert: ``high`` or ``low``, or ``""`` if there is a single denoiser.
    """

    index: int
    time: float
    next_time: float
    timestep: float
    expert: str


def schedule(num_steps: int, sigma_max: float, boundary: float | None = None) -> list[Step]:
    """The steps of a run.

    Args:
        num_steps: Number of steps, 1 to 4.
        sigma_max: Noise level of the first step. With more than one step, it must be above the largest of the later
            steps (tan 1.5 = 14.1).
        boundary: Time below which the low-noise expert takes over, permanently.

    Raises:
        RequestError: `num_steps` or `sigma_max` is out of range.
    """
    if not 1 <= num_steps <= MAX_STEPS:
        raise RequestError(f"{num_steps} steps; these models were distilled for 1 to {MAX_STEPS}")
    least = math.tan(LATER_ANGLES[0]) if num_steps > 1 else 0.0
    if not (math.isfinite(sigma_max) and sigma_max > least):
        raise RequestError(f"sigma_max is {sigma_max}; it must be finite and above {least:.4g}")
    angles = torch.tensor([math.atan(sigma_max), *LATER_ANGLES[: num_steps - 1], 0.0], dtype=torch.float64)
    times = (angles.sin() / (angles.sin() + angles.cos())).tolist()
    return [
        Step(index, time, next_time, network_timestep(time), expert_at(time, boundary))
        for index, (time, next_time) in enumerate(pairwise(times))
    ]


def network_timestep(time: float) -> float:
    """The float32 time on a scale of 1000, computed in float64 and rounded once to bfloat16: 988, 932, 852, 608."""
    scaled = torch.tensor(time, dtype=torch.float32).double() * TIMESTEP_SCALE
    return float(scaled.to(torch.bfloat16))


def expert_at(time: float, boundary: float | None) -> str:
    """The expert for a time. Times only decrease, so the switch from high to low happens once and is permanent."""
    if boundary is None:
        return ""
    return "high" if time >= boundary else "low"


def sample(denoise: Denoiser, steps: list[Step], noise: Iterator[Tensor], *, ode: bool = False) -> Tensor:
    """Run a denoiser over a schedule.

    Args:
        denoise: The denoiser, called once per step.
        noise: Standard normal float32 tensors of the latents' shape: one to start from and, without `ode`, one per
            step (the last one is drawn, but multiplied by zero).
        ode: Whether to follow the flow without fresh noise.

    Returns:
        The clean latents in float64.
    """
    latents = next(noise).double() * steps[0].time
    for step in steps:
        velocity = denoise(latents, step).double()
        if ode:
            latents = latents - (step.time - step.next_time) * velocity
        else:
            # The product of time and noise is computed in float32, as upstream does.
            fresh = next(noise).float() * torch.tensor(step.next_time, dtype=torch.float32)
            latents = (1 - step.next_time) * (latents - step.time * velocity) + fresh
    return latents


def gaussian(shape: tuple[int, ...], seed: int) -> Iterator[Tensor]:
    """Endless standard normal float32 tensors from a CPU generator, so a seed gives the same noise on every machine.

    Upstream uses CUDA's generator, which gives other noise for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator)
