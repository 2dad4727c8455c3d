"""Samplers: at which times the steps of a model are taken, and how one leads to the next."""

from itertools import pairwise
from typing import Annotated, Literal

from msgspec import Meta

from wanforge.configs.loading import Fraction, Positive, Record

MOST_STEPS = 16
"""The most steps of a sampler for models that were distilled to a few."""
RCM_STEPS = 4
"""The most steps of rCM, whose times follow from a rule."""

Update = Literal["renoise", "euler"]


class SamplerConfig(Record, frozen=True):
    """How a model that was distilled to a few steps is sampled. The defaults are TurboDiffusion's.

    Source: TurboDiffusion, inference/wan2.1_t2v_infer.py and wan2.2_i2v_infer.py; of the other families, LightX2V,
    models/schedulers/wan/step_distill, and FastVideo, pipelines/stages/denoising.py (docs/sources.md).
    """

    steps: Annotated[int, Meta(ge=1, le=MOST_STEPS)] = RCM_STEPS
    times: tuple[Fraction, ...] = ()
    """Rectified-flow times at which the network is evaluated, 1 being noise and 0, which follows the last, data. By
    default they are those of rCM, which follow from `sigma_max`."""
    sigma_max: Positive = 80.0
    """Noise level of rCM's first step."""
    update: Update = "renoise"
    """How one step leads to the next: the clean latents that the network points to are mixed with fresh noise, or the
    latents move along the flow (``euler``)."""
    start: Literal["first time", "one"] = "first time"
    """What the noise is multiplied with before the first step."""
    timestep: Literal["bfloat16", "float32", "integer"] = "bfloat16"
    """What the time that the network is given, on a scale of 1000, is rounded to."""
    boundary: Fraction | None = None
    """Time below which the low-noise expert takes over; None if there is one denoiser, or if `low_from` says it."""
    low_from: Annotated[int, Meta(ge=1, le=MOST_STEPS)] | None = None
    """Number of the steps before the low-noise expert takes over."""

    def __post_init__(self) -> None:
        check_times(self.times)
        if self.times and len(self.times) != self.steps:
            raise ValueError(f"steps is {self.steps}, but there are {len(self.times)} times")
        if not self.times and self.steps > RCM_STEPS:
            raise ValueError(f"steps is {self.steps}; without times it is at most {RCM_STEPS}")
        if self.boundary is not None and self.low_from is not None:
            raise ValueError("boundary and low_from are both set; the low-noise expert takes over only once")

    @property
    def has_experts(self) -> bool:
        """Whether there is one denoiser for the noisier steps and one for the others."""
        return self.boundary is not None or self.low_from is not None

    @property
    def most_steps(self) -> int:
        """The most steps that may be asked for."""
        return len(self.times) or RCM_STEPS


def check_times(times: tuple[float, ...]) -> None:
    """Refuse times that do not lead from noise to data.

    Raises:
        ValueError: They do not decrease, or one is not above 0 and at most 1.
    """
    if not all(0.0 < time <= 1.0 for time in times) or any(later >= time for time, later in pairwise(times)):
        raise ValueError(f"the times {', '.join(map(str, times))} do not decrease from at most 1 to above 0")
