"""Sampling: from noise to latents in a few steps.

The state is float64. The network gets it in the compute type, with a timestep rounded to bfloat16.

Source: rCM (arXiv:2510.08431) as in TurboDiffusion, inference/wan2.1_t2v_infer.py and wan2.2_i2v_infer.py
(docs/sources.md).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wanforge.runtime.reference.steps import Step, Trajectory

Denoiser = Callable[[Tensor, Step], Tensor]
"""``(latents, step) -> velocity``: latents in float64, the velocity in their shape and any float type."""


def sample(denoise: Denoiser, trajectory: Trajectory, noise: Iterator[Tensor]) -> Tensor:
    """Follow a trajectory.

    Args:
        denoise: The denoiser, called once per step.
        noise: Standard normal float32 tensors of the latents' shape, as many as `Trajectory.draws`.

    Returns:
        The clean latents in float64.
    """
    latents = next(noise).double() * trajectory.start
    for step in trajectory.steps:
        velocity = denoise(latents, step)
        if trajectory.update == "euler":
            latents = latents - (step.time - step.next_time) * velocity.double()
        else:
            latents = renoise(latents, velocity, step, next(noise))
    return latents


def renoise(latents: Tensor, velocity: Tensor, step: Step, fresh: Tensor) -> Tensor:
    """The latents after a step that mixes the clean latents, to which the velocity points, with fresh noise."""
    # The product of time and noise is computed in float32, as upstream does.
    noise = fresh.float() * torch.tensor(step.next_time, dtype=torch.float32)
    return (1 - step.next_time) * (latents - step.time * velocity.double()) + noise


def gaussian(shape: tuple[int, ...], seed: int) -> Iterator[Tensor]:
    """Endless standard normal float32 tensors from a CPU generator, so a seed gives the same noise on every machine.

    Upstream uses CUDA's generator, which gives other noise for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator)
