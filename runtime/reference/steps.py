"""The steps of rCM sampling: when each happens, and which expert takes it.

Nothing here needs PyTorch, so that a request can be checked without it.

Source: rCM (arXiv:2510.08431) as in TurboDiffusion, inference/wan2.1_t2v_infer.py and wan2.2_i2v_infer.py
(docs/sources.md).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from wanforge.errors import RequestError

LATER_ANGLES = (1.5, 1.4, 1.0)
"""TrigFlow times of the steps after the first, in radians."""
MAX_STEPS = 1 + len(LATER_ANGLES)
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
    angles = [math.atan(sigma_max), *LATER_ANGLES[: num_steps - 1], 0.0]
    times = [math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles]
    return [
        Step(index, time, next_time, network_timestep(time), expert_at(time, boundary))
        for index, (time, next_time) in enumerate(pairwise(times))
    ]


def network_timestep(time: float) -> float:
    """The float32 time on a scale of 1000, computed in float64 and rounded once to bfloat16: 988, 932, 852, 608."""
    scaled = float(np.float32(time)) * TIMESTEP_SCALE
    significand, exponent = math.frexp(scaled)
    return math.ldexp(round(math.ldexp(significand, BFLOAT16_BITS)), exponent - BFLOAT16_BITS)


def expert_at(time: float, boundary: float | None) -> str:
    """The expert for a time. Times only decrease, so the switch from high to low happens once and is permanent."""
    if boundary is None:
        return ""
    return "high" if time >= boundary else "low"
