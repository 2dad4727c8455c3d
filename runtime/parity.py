"""Holds a backend against the reference: each step from the reference's own latents, then the whole clip."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wanforge.engines.bundle import Bundle
from wanforge.runtime.backends import create_backend
from wanforge.runtime.pipeline import Pipeline, Progress, Request, Timings
from wanforge.runtime.reference.sampler import Step, sample


@dataclass(frozen=True)
class Parity:
    """How far a backend is from the reference.

    Attributes:
        step_errors: relative RMS error of each step's velocity, both given the reference's latents.
        step_cosines: their cosine.
        latents_error: relative RMS error of the clean latents when each runs on its own.
        clip_psnr_db: of the 8-bit frames; infinite where they are equal.
        required_psnr_db: what the recipe asks for.
    """

    step_errors: list[float] = field(default_factory=list)
    step_cosines: list[float] = field(default_factory=list)
    latents_error: float = 0.0
    clip_psnr_db: float = 0.0
    required_psnr_db: float = 0.0

    @property
    def passed(self) -> bool:
        return self.clip_psnr_db >= self.required_psnr_db

    def as_json(self) -> dict[str, Any]:
        """Plain values; JSON has no infinity, so equal frames are null dB apart."""
        psnr = None if self.clip_psnr_db == float("inf") else self.clip_psnr_db
        return {**self.__dict__, "clip_psnr_db": psnr, "passed": self.passed}


def parity(bundle: Bundle, backend: str, request: Request, progress: Progress = lambda *_: None) -> Parity:
    """Run a request on the reference and on a backend, from the same noise."""
    reference = Pipeline(bundle, create_backend("torch", bundle))
    other = Pipeline(bundle, create_backend(backend, bundle))
    expected, states, velocities = trajectory(reference, request, progress)
    job = other.check(request)
    denoiser = other.denoiser(job, Timings(), progress)
    forced = [denoiser(state, step) for state, step in zip(states, job.steps, strict=True)]
    latents, _, _ = trajectory(other, request, progress)
    frames = [clip(p, z, request, progress) for p, z in ((reference, expected), (other, latents))]
    return Parity(
        [relative_rms(a, e) for a, e in zip(forced, velocities, strict=True)],
        [cosine(a, e) for a, e in zip(forced, velocities, strict=True)],
        relative_rms(latents, expected),
        psnr(frames[1], frames[0], 255.0),
        bundle.recipe.parity_psnr_db,
    )


def trajectory(pipeline: Pipeline, request: Request, progress: Progress) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The clean latents of a request, and the latents before and the velocity at each step."""
    job = pipeline.check(request)
    denoiser = pipeline.denoiser(job, Timings(), progress)
    states: list[Tensor] = []
    velocities: list[Tensor] = []

    def observed(latents: Tensor, step: Step) -> Tensor:
        states.append(latents)
        velocities.append(denoiser(latents, step))
        return velocities[-1]

    return sample(observed, job.steps, pipeline.noise(job), ode=request.ode), states, velocities


def clip(pipeline: Pipeline, latents: Tensor, request: Request, progress: Progress) -> Tensor:
    return torch.stack(list(pipeline.frames(latents, request.shape, Timings(), progress)))


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what was expected."""
    a, e = actual.double(), expected.double()
    return float((a - e).square().mean().sqrt() / e.square().mean().sqrt())


def cosine(actual: Tensor, expected: Tensor) -> float:
    a, e = actual.double().flatten(), expected.double().flatten()
    return float(a @ e / (a.norm() * e.norm()))


def psnr(actual: Tensor, expected: Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = (actual.double() - expected.double()).square().mean()
    return float("inf") if error == 0 else float(10 * torch.log10(peak**2 / error))
