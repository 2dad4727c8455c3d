"""The steps of sampling: when each happens, which expert takes it, and how one leads to the next.

Nothing here needs PyTorch, so that a request can be checked without it.

Source: rCM (arXiv:2510.08431) as in TurboDiffusion, inference/wan2.1_t2v_infer.py and wan2.2_i2v_infer.py
(docs/sources.md).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from wanforge.configs.sampler import SamplerConfig, Update, check_times
from wanforge.errors import RequestError

LATER_ANGLES = (1.5, 1.4, 1.0)
"""TrigFlow times of rCM's steps after the first, in radians."""
TIMESTEP_SCALE = 1000.0
BFLOAT16_BITS = 8
"""Bits of bfloat16's significand, the leading one included."""


@dataclass(frozen=True)
class Step:
    """One evaluation of the network.

    Attributes:
        index: Number of the step, from 0.
        time: Rectified-flow time before the step, 0 (data) to 1 (noise).
        next_time: Time after the step; 0 for the last one.
        timestep: Time that the network is given, on a scale of 1000, rounded as the model's sampler says.
        expert: ``high`` or ``low``, or ``""`` if there is a single denoiser.
    """

    index: int
    time: float
    next_time: float
    timestep: float
    expert: str


@dataclass(frozen=True)
class Trajectory:
    """The way from noise to latents.

    Attributes:
        start: What the noise is multiplied with before the first step.
        update: How one step leads to the next; see `SamplerConfig`.
    """

    steps: tuple[Step, ...]
    start: float
    update: Update

    @property
    def draws(self) -> int:
        """How many tensors of noise it takes: one to start from and, to renoise, one for each step. The last one is
        drawn, but multiplied by zero."""
        return 1 + (len(self.steps) if self.update == "renoise" else 0)


def trajectory(
    sampler: SamplerConfig,
    num_steps: int | None = None,
    times: tuple[float, ...] | None = None,
    update: Update | None = None,
) -> Trajectory:
    """The way from noise to latents by a model's sampler, or with something else in its place.

    Args:
        num_steps: Number of steps.
        times: Times of the steps, as in `SamplerConfig`.
        update: How one step leads to the next.

    Raises:
        RequestError: The number of steps, the times or rCM's noise level are out of range.
    """
    found = _times(sampler, num_steps, times)
    return Trajectory(
        tuple(
            Step(index, time, next_time, network_timestep(time, sampler.timestep), expert_at(index, time, sampler))
            for index, (time, next_time) in enumerate(pairwise([*found, 0.0]))
        ),
        found[0] if sampler.start == "first time" else 1.0,
        update or sampler.update,
    )


def _times(sampler: SamplerConfig, num_steps: int | None, times: tuple[float, ...] | None) -> tuple[float, ...]:
    given = sampler.times if times is None else times
    if times is None and not given:
        return rcm_times(sampler.steps if num_steps is None else num_steps, sampler.sigma_max)
    try:
        check_times(given)
    except ValueError as error:
        raise RequestError(str(error)) from None
    if not 1 <= len(given) <= sampler.most_steps:
        raise RequestError(f"{len(given)} times; this model is sampled in 1 to {sampler.most_steps} steps")
    if num_steps not in (None, len(given)):
        where = "its sampler has" if times is None else "there are"
        raise RequestError(f"{num_steps} steps, but {where} {len(given)} times; give as many times, or leave steps out")
    return given


def rcm_times(num_steps: int, sigma_max: float) -> tuple[float, ...]:
    """The times of rCM.

    Args:
        num_steps: Number of steps, 1 to 4.
        sigma_max: Noise level of the first step. With more than one step, it must be above the largest of the later
            steps (tan 1.5 = 14.1).

    Raises:
        RequestError: `num_steps` or `sigma_max` is out of range.
    """
    if not 1 <= num_steps <= 1 + len(LATER_ANGLES):
        raise RequestError(f"{num_steps} steps; these models were distilled for 1 to {1 + len(LATER_ANGLES)}")
    least = math.tan(LATER_ANGLES[0]) if num_steps > 1 else 0.0
    if not (math.isfinite(sigma_max) and sigma_max > least):
        raise RequestError(f"sigma_max is {sigma_max}; it must be finite and above {least:.4g}")
    angles = [math.atan(sigma_max), *LATER_ANGLES[: num_steps - 1]]
    return tuple(math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles)


def network_timestep(time: float, rounding: str = "bfloat16") -> float:
    """The float32 time on a scale of 1000, computed in float64 and rounded once: to bfloat16, 988, 932, 852 and 608 for
    rCM."""
    scaled = float(np.float32(time)) * TIMESTEP_SCALE
    match rounding:
        case "integer":
            return float(round(scaled))
        case "float32":
            return float(np.float32(scaled))
    significand, exponent = math.frexp(scaled)
    return math.ldexp(round(math.ldexp(significand, BFLOAT16_BITS)), exponent - BFLOAT16_BITS)


def expert_at(index: int, time: float, sampler: SamplerConfig) -> str:
    """The expert for a step. Times only decrease, so the switch from high to low happens once and is permanent."""
    if not sampler.has_experts:
        return ""
    is_high = time >= sampler.boundary if sampler.boundary is not None else index < (sampler.low_from or 0)
    return "high" if is_high else "low"
