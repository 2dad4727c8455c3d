"""The denoiser of one request, driven step by step by the sampler."""

import time
from typing import Protocol

import torch
from torch import Tensor

from wanforge.engines.bundle.bundle import Bundle
from wanforge.progress import Progress, silent
from wanforge.runtime.backends.base import Backend, Session
from wanforge.runtime.graphs import graphs
from wanforge.runtime.reference.dit import patchify, rope_tables, sinusoid, unpatchify
from wanforge.runtime.reference.ranks.shares import Division
from wanforge.runtime.reference.steps import Step
from wanforge.runtime.request import CheckedRequest, Timings
from wanforge.runtime.schedule import context_rows, denoise_schedule, with_preview


class Watch(Protocol):
    """Called after each step with the denoiser's session and the clean latents that the step predicts, in float64."""

    def __call__(self, session: Session, latents: Tensor, step: Step, /) -> None: ...


class Denoiser:
    """Maps latents and a step to a velocity.

    Whatever depends only on the prompt, the steps and the shape is computed once, at construction.

    Attributes:
        watch: Is shown what each step predicts, if it is set. The stage ``preview`` is the time that it takes.

    Args:
        text: The embedded prompt ``[1, T, E]``, padded with rows of zeros.
        channels: The 20 channels of `image.condition`, for image-to-video models.
    """

    def __init__(
        self,
        backend: Backend,
        bundle: Bundle,
        checked: CheckedRequest,
        text: Tensor,
        channels: Tensor | None,
        timings: Timings,
        progress: Progress = silent,
    ) -> None:
        self.backend, self.shape, self.timings, self.progress = backend, checked.request.shape, timings, progress
        self.watch: Watch | None = None
        self.channels = None if channels is None else channels.to(backend.device)
        model, recipe = bundle.model, bundle.recipe
        kept, biases = context_rows(
            len(checked.ids), model.dit.text_rows, recipe.rows_per_scale, backend.text_rows_multiple
        )
        heads = model.dit.num_heads
        self.division = Division(backend.exchange, self.shape.tokens, heads, recipe.rows_per_scale)
        known = backend.ported(graphs(model, recipe))
        schedule = denoise_schedule(
            model,
            known,
            self.shape,
            [step.expert for step in checked.steps],
            context_rows=len(kept),
            num_selected=checked.num_selected,
            tokens=self.division.counts[backend.exchange.rank],
        )
        self.session = session = backend.session(with_preview(schedule, known, self.shape))
        session["text"].copy_(text)
        session["kept_rows"].copy_(torch.tensor(kept))
        session["key_bias"].copy_(torch.tensor(biases))
        for name, table in zip(("cos", "sin"), rope_tables(self.shape.grid), strict=True):
            session[name].copy_(table[self.division.own])
        session["selection"].zero_()
        for step in checked.steps:
            timestep = torch.tensor([step.timestep])
            session[f"sinusoid.{step.index}"].copy_(sinusoid(timestep, model.dit.frequency_dim))
        session.run("prompt", "prepare", progress)
        session.run("times", "prepare", progress)
        backend.synchronise()

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """Return the velocity at these latents, in their shape."""
        start = time.perf_counter()
        x = latents.to(self.backend.device, self.backend.dtype)
        x = x if self.channels is None else torch.cat((x, self.channels), 1)
        self.session["patches"].copy_(patchify(x)[:, self.division.own])
        self.session.run(f"step.{step.index}", f"step {step.index + 1}", self.progress)
        velocity = unpatchify(self.division.to_all(self.session["velocity"]), self.shape.grid).to(latents.device)
        self.backend.synchronise()
        self.timings.steps.append(time.perf_counter() - start)
        if self.watch is not None:
            with self.timings.stage("preview"):
                self.watch(self.session, latents - step.time * velocity.double(), step)
        return velocity
